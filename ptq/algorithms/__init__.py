"""Weight, Hessian and grid in; codes and scales out. Pure functions: nothing is modified, nothing is logged."""

from ptq.algorithms.descent import coordinate_descent
from ptq.algorithms.factor import Factor, IndefiniteHessian, damped, factorize
from ptq.algorithms.gptq import gptq
from ptq.algorithms.rtn import rtn

__all__ = ["ALGORITHMS", "Factor", "IndefiniteHessian", "coordinate_descent", "damped", "factorize", "gptq", "rtn"]

ALGORITHMS = {"rtn": rtn, "gptq": gptq}
