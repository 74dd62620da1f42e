"""Metal kernels and the devices that run them: here, the host CPU.

`library.compile` is the way in; nothing is imported before it is asked for.
"""
