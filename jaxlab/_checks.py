"""What public functions refuse, each in the same words: counts, numbers, flags.

The checks run in Python, while a program is traced: they see types, shapes and dtypes
of everything, and values of Python and NumPy numbers alone. No jax here: the data sets
do without it.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# What a number may be asked to be: the words of the message, and their meaning, which
# is false of NaN.
_NEEDS: dict[str, Callable[[Any], bool]] = {
    "a number": lambda x: True,
    "finite": lambda x: -math.inf < x < math.inf,
    ">= 0": lambda x: x >= 0,
    "finite and >= 0": lambda x: 0 <= x < math.inf,
    "finite and > 0": lambda x: 0 < x < math.inf,
    "finite and >= 1": lambda x: 1 <= x < math.inf,
    "finite and >= 8": lambda x: 8 <= x < math.inf,
    "in (0, 1)": lambda x: 0 < x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in (0.5, 1]": lambda x: 0.5 < x <= 1,
}


def is_whole(value: Any) -> bool:
    """Tells whether a value is a Python or NumPy integer; a boolean is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def are_sizes(values: Any) -> bool:
    """Tells whether a value is a sequence of integers that are all >= 1."""
    listed = hasattr(values, "__iter__") and not isinstance(values, (str, dict))
    return listed and all(is_whole(value) and value >= 1 for value in values)


def check_count(
    name: str, *, least: int = 1, optional: bool = False, **counts: Any
) -> None:
    """Refuses what is no integer of a least size, for sizes that shape the program.

    Raises:
      ValueError: naming the argument; ``optional`` lets None through.
    """
    for argument, count in counts.items():
        if (optional and count is None) or (is_whole(count) and count >= least):
            continue
        numpy = isinstance(count, (np.ndarray, np.generic))
        array = hasattr(count, "dtype") and not numpy  # as inject_hyperparams makes it
        hint = "; it is static, so name it in static_args=" if array else ""
        raise ValueError(
            f"{name}: {argument} must be an integer >= {least}"
            f"{' or None' if optional else ''}, got {described(count)}{hint}."
        )


def check_number(
    name: str,
    need: str,
    *,
    optional: bool = False,
    schedule: bool = False,
    hint: str = "",
    **numbers: Any,
) -> None:
    """Refuses what is no single real number; of those with a value, the wrong ones.

    An array of shape () may be traced and passes whatever its value.

    Args:
      name: of the function, for the message.
      need: a key of the table above, such as "finite and >= 0".
      optional: lets None through.
      schedule: lets functions of the step through.
      hint: ends the message.
      **numbers: by the names of the arguments.

    Raises:
      ValueError: naming the argument.
    """
    for argument, number in numbers.items():
        if (optional and number is None) or (schedule and callable(number)):
            continue
        array = hasattr(number, "shape") and hasattr(number, "dtype")
        if array and not isinstance(number, (np.ndarray, np.generic)):
            if number.shape == () and _is_real(number.dtype):
                continue
        elif _is_one_number(number):
            if _NEEDS[need](number):
                continue
            raise ValueError(f"{name}: {argument} must be {need}, got {number}{hint}.")
        other = " or a schedule" if schedule else " or None" if optional else ""
        several = bool(getattr(number, "shape", ()))
        many = "; map over several with jax.vmap" if several else ""
        more = "" if need == "a number" else f", {need}"
        raise ValueError(
            f"{name}: {argument} must be a single real number{other}{more}, got "
            f"{described(number)}{many}{hint}."
        )


def check_flag(name: str, **flags: Any) -> None:
    """Refuses what is neither True nor False.

    Raises:
      ValueError: naming the argument.
    """
    for argument, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise ValueError(
                f"{name}: {argument} must be True or False, got {described(flag)}."
            )


def check_sequence(name: str, argument: str, value: Any, of: str) -> None:
    """Refuses what is nothing to go through, and strings.

    Raises:
      ValueError: saying what it must hold.
    """
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(
            f"{name}: {argument} must be a sequence of {of}, got {described(value)}."
        )


def check_made(name: str, argument: str, value: Any, kind: type, maker: str) -> None:
    """Refuses what another function of ours did not make.

    Raises:
      ValueError: naming that function.
    """
    if not isinstance(value, kind):
        raise ValueError(
            f"{name}: {argument} must be the {kind.__name__} that {maker} makes, got "
            f"{described(value)}."
        )


def described(value: Any) -> str:
    """Says in a message what came: arrays by dtype and shape, others as they print."""
    if value is None or isinstance(value, (int, float, complex, str, np.generic)):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    return type(value).__name__


def _is_one_number(value) -> bool:
    if isinstance(value, bool) or not hasattr(value, "dtype"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return value.shape == () and _is_real(value.dtype)


def _is_real(dtype) -> bool:
    # By name, since bfloat16 and its kin are unknown to NumPy.
    return re.match("bfloat|float[1-9]|u?int", str(dtype)) is not None
