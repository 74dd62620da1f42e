"""One contract a file: each module here has a `CONTRACT`, and is found by being here."""
