"""The choices of the math verifier where mathematics alone does not decide, each a named setting.

Invariant: a default accepts what a fair examiner would and nothing that merely resembles it; the
table `tests/data/math_pairs.yaml` holds a case for every value. Settings of `math` in a config;
read by `rewards.quantities`, `rewards.structures` and `rewards.symbolic`.
"""

from typing import Annotated, Any, Literal

import msgspec

from cluster.errors import ConfigError

NonNegative = Annotated[float, msgspec.Meta(ge=0)]


class MathPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    r"""How answers are compared.

    `boxes`: the last `\boxed{}` counts, or all of them must hold the same answer.
    `units`: counted where both have one (5 cm = 50 mm, 5 cm is not 5 m); required where the
      reference has one; or dropped.
    `percent`: strict takes 42% for 0.42 but no percentage for a whole number; hundredth also 4200%
      for 42; ignore drops the sign.
    `pairs`: what `(1, 2)` in a reference may be: a tuple (then a vector equals it), an open
      interval (then 1 < x < 2 does), or either.
    `inequalities`: sets makes x >= 0 equal [0, oo); as_written does not.
    `ratios`: 3:4 compared as text, or by value (6:8, 3/4).
    `bases`: 10_2 must come in the same base (or bare, 10), or have the same value (2).
    `constants`: any lets the C of a reference that ends in + C have another letter.
    `imaginary`: i is the imaginary unit. `tolerance`: largest relative error of a number; 0 is
    exact, except that a decimal for an irrational number needs six digits.
    """

    boxes: Literal["last", "agree"] = "last"
    units: Literal["compare", "require", "ignore"] = "compare"
    percent: Literal["strict", "hundredth", "ignore"] = "strict"
    pairs: Literal["either", "tuple", "interval"] = "either"
    inequalities: Literal["sets", "as_written"] = "sets"
    ratios: Literal["text", "value"] = "text"
    bases: Literal["same", "value"] = "same"
    constants: Literal["any", "named"] = "any"
    imaginary: bool = True
    tolerance: NonNegative = 0.0


DEFAULT = MathPolicy()


def read_policy(settings: dict[str, Any]) -> MathPolicy:
    """The policy of these settings. Raises `ConfigError` naming the one that is wrong."""
    try:
        return msgspec.convert(settings, MathPolicy)
    except msgspec.ValidationError as error:
        known = ", ".join(MathPolicy.__struct_fields__)
        raise ConfigError(f"{error} (policy settings: {known})") from None
