"""Weight, Hessian and grid in; codes and scales out. Pure functions: nothing is modified, nothing
is logged."""

from ptq.numerics.descent import coordinate_descent
from ptq.numerics.factor import Factor, IndefiniteHessian, damped, factorize
from ptq.numerics.gptq import gptq
from ptq.numerics.rtn import rtn

__all__ = [
    "ALGORITHMS",
    "Factor",
    "IndefiniteHessian",
    "coordinate_descent",
    "damped",
    "factorize",
    "gptq",
    "rtn",
]

ALGORITHMS = {"rtn": rtn, "gptq": gptq}
