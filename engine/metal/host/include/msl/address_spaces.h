// Address spaces and function qualifiers as macros, for compiling kernel headers that the rewriter has not been over.
// metal_stdlib does not include it: `thread`, `kernel` and `device` are ordinary names in the runtime's own headers.
#pragma once

#define device
#define thread
#define threadgroup
#define threadgroup_imageblock
#define constant const
#define kernel
#define vertex
#define fragment
#define ray_data
#define object_data
