"""Per-element error bounds: how far honest arithmetic may be from the exact result of an op.

Every function takes float64 tensors that hold the exact inputs (already rounded to the dtype they arrive in) and the
Arithmetic the candidate states, and returns a Bounded: exact result, worst-case bound, probabilistic level. Honest
code in any order of operations is inside; one rounding more than stated falls outside wherever the op's
conditioning lets it show. The derivations stand beside the formulas. Sources: Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., ch. 2-4; Higham & Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM
J. Sci. Comput. 41 (2019).
"""

from reference.bounds.attention import attention
from reference.bounds.core import Bounded
from reference.bounds.pointwise import rms_norm, rope, swiglu
from reference.bounds.products import add, linear, matmul, weighted_sum
from reference.bounds.router import router_scores, router_weights
from reference.bounds.sampling import penalties
from reference.bounds.softmax import softmax

__all__ = [
    "Bounded",
    "add",
    "attention",
    "linear",
    "matmul",
    "penalties",
    "rms_norm",
    "rope",
    "router_scores",
    "router_weights",
    "softmax",
    "swiglu",
    "weighted_sum",
]
