"""Rotary positions in a `config.json`: both spellings, read as `transformers` 5 reads them, and written."""

import dataclasses
import math
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files.fields import shown
from xtoken_jax.models.hf.families import Family
from xtoken_jax.models.hf.settings import FULL, SLIDING, check_number, check_positive, value_of
from xtoken_jax.models.hf.types import check_rope
from xtoken_jax.models.rope import LinearScaling, Llama3Scaling, LongRope, RopeScaling, Yarn

_PRETRAINED = "original_max_position_embeddings"
_KINDS = {"linear": LinearScaling, "llama3": Llama3Scaling, "longrope": LongRope, "yarn": Yarn}
# What rope settings may hold. A key that its rope type does not use changes nothing, in transformers as here:
# "attn_factor", for one, is vLLM's; "finetuned" is a note.
_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", _PRETRAINED, "attention_factor",
    "attn_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "finetuned",
}  # fmt: skip


def read_rope(hf: dict[str, Any], family: Family) -> tuple[float, RopeScaling | None, float, float | None]:
    """Read rope_theta, scaling, the rotated share of a head, and the rope_theta of sliding layers.

    `rope_scaling` (transformers 4), where it is not empty, takes the place of `rope_parameters` (transformers
    5), its `rope_theta` included. A `rope_theta` next to either holds where these settings have none.
    A family with two ropes has an entry for each kind of layer in `rope_parameters`; there `rope_scaling` is
    merged into the entry of full attention, and `rope_local_base_freq` is the older name of the other base.

    Args:
        hf: content of config.json with the family's defaults.
        family: whose config.json it is.

    Raises:
        UserError: settings that are not implemented, incomplete or unknown.
    """
    local = hf.get("rope_local_base_freq")
    if family.two_ropes:
        rope, inner = _two_ropes(hf)
        local = inner.get("rope_theta", local)
    else:
        default = family.defaults.get("rope_parameters")
        rope = _settings(hf.get("rope_scaling")) or _settings(value_of(hf, "rope_parameters", default))
        if nested := [kind for kind in (FULL, SLIDING) if kind in rope]:
            raise UserError(
                f"rope settings by kind of layer ({nested[0]}) are not implemented for model_type"
                f" {family.model_type}"
            )
        if local is not None:
            raise UserError(
                f"rope_local_base_freq={shown(local)} is not known for model_type {family.model_type}"
            )
    if odd := [key for key, value in rope.items() if key not in _KEYS and value is not None]:
        raise UserError(f"the rope setting {odd[0]}={shown(rope[odd[0]])} is not known")
    check_rope(rope)
    theta = rope["rope_theta"] if "rope_theta" in rope else hf.get("rope_theta", 10000.0)
    if check_number("rope_theta", theta) == 0:
        raise UserError("rope_theta=0 must be above zero")
    partial = value_of(rope, "partial_rotary_factor", value_of(hf, "partial_rotary_factor", 1.0))
    if partial != 1 and not family.partial_rotary:
        raise UserError(
            f"partial_rotary_factor={shown(partial)} is not implemented for model_type {family.model_type};"
            " supported: 1"
        )
    return theta, _scaling(rope, hf, family, theta), partial, local


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"rope settings must be an object, not {shown(value)}")
    return value or {}


def _two_ropes(hf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rope settings of full and of sliding layers."""
    both, older = _settings(hf.get("rope_parameters")), _settings(hf.get("rope_scaling"))
    if both and FULL not in both and SLIDING not in both:
        raise UserError(f"rope_parameters={shown(both)} must have an entry {FULL} and an entry {SLIDING}")
    if older.get("type", "default") != "default" and "rope_type" not in older:
        # transformers 4 reads this key, transformers 5 does not
        raise UserError(f'rope_scaling={shown(older)}: write "rope_type" in place of "type"')
    full, inner = ({"rope_type": "default", **_settings(both.get(kind))} for kind in (FULL, SLIDING))
    if inner["rope_type"] != "default":
        raise UserError(f"rope type {shown(inner['rope_type'])} of {SLIDING} layers is not implemented")
    if odd := [key for key, value in inner.items() if key not in _KEYS and value is not None]:
        raise UserError(f"the rope setting {odd[0]}={shown(inner[odd[0]])} of {SLIDING} layers is not known")
    check_rope(inner)
    return {**full, **older}, inner


def _scaling(rope: dict[str, Any], hf: dict[str, Any], family: Family, theta: float) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = family.rope_types.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "default":
        return None
    supported = sorted(set(family.rope_types.values())) or list(_KINDS)
    if kind not in supported:
        raise UserError(
            f"rope type {shown(kind)} is not implemented for model_type {family.model_type};"
            f" supported: default, {', '.join(supported)}"
        )
    values = dict(rope)
    if not family.two_ropes and hf.get(_PRETRAINED) is not None:
        values[_PRETRAINED] = hf[_PRETRAINED]  # next to the settings, it wins
    elif kind in ("yarn", "longrope") and values.get(_PRETRAINED) is None:
        values[_PRETRAINED] = hf.get("max_position_embeddings")
    if kind == "yarn":
        return _yarn(values, hf, theta, flat=not family.two_ropes)
    if kind == "longrope":
        return _longrope(values, hf)
    names = [field.name for field in dataclasses.fields(_KINDS[kind])]
    wanted = _wanted(names, values, kind)
    return _KINDS[kind](**wanted)


def _longrope(values: dict[str, Any], hf: dict[str, Any]) -> LongRope:
    names = ("short_factor", "long_factor", _PRETRAINED)
    wanted = _wanted(names, values, "longrope")
    pretrained = check_positive(_PRETRAINED, wanted[_PRETRAINED])
    for name in names[:2]:
        if not isinstance(wanted[name], list):
            raise UserError(f"the longrope setting {name} must be a list, not {shown(wanted[name])}")
        wanted[name] = tuple(map(float, wanted[name]))
    scale = values.get("attention_factor")
    if scale is None:
        factor = check_number("factor", _factor(values, hf, pretrained))
        if factor > 1 and pretrained == 1:
            raise UserError(f"{_PRETRAINED}=1 gives no attention_factor; it must be above 1")
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(pretrained))
    return LongRope(**wanted, attention_factor=check_number("attention_factor", scale))


def _yarn(values: dict[str, Any], hf: dict[str, Any], theta: float, flat: bool) -> Yarn:
    if "factor" not in values:
        raise UserError("the yarn rope settings lack factor")
    pretrained = check_positive(_PRETRAINED, _wanted((_PRETRAINED,), values, "yarn")[_PRETRAINED])
    factor = _factor(values, hf, pretrained)
    truncate = value_of(values, "truncate", True)
    if not isinstance(truncate, bool) or not (truncate or flat):
        raise UserError(
            f"the yarn rope setting truncate={shown(truncate)} is not implemented; supported: true"
        )
    if theta <= 1:
        raise UserError(f"rope_theta={theta} must be above 1 for rope type yarn")
    defaults = {"factor": factor, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
    settings = _wanted(defaults, {k: values.get(k) or default for k, default in defaults.items()}, "yarn")
    mscale, mscale_all_dim = settings.pop("mscale"), settings.pop("mscale_all_dim")

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    scale = values.get("attention_factor")
    if scale is None:
        given = mscale and mscale_all_dim
        scale = magnitude(mscale) / magnitude(mscale_all_dim) if given else magnitude()
    return Yarn(
        **settings,
        original_max_position_embeddings=pretrained,
        attention_factor=check_number("attention_factor", scale),
        truncate=truncate,
    )


def _factor(values: dict[str, Any], hf: dict[str, Any], pretrained: int) -> float:
    """The factor, by default that between the lengths now and in pretraining."""
    now = check_number("max_position_embeddings", value_of(hf, "max_position_embeddings", pretrained))
    return value_of(values, "factor", now / pretrained)


def written_rope(config: Any, family: Family) -> dict[str, Any]:
    """Both spellings: transformers 4 and most other readers know the older, transformers 5 the newer."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    written: dict[str, Any] = {"rope_theta": config.rope_theta}
    if scaling is not None:
        name = next(name for name, kind in _KINDS.items() if isinstance(scaling, kind))
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(scaling).items()}
        rope = {"rope_type": name, **values}
    if isinstance(scaling, LongRope):
        # transformers 4 reads it here
        written[_PRETRAINED] = scaling.original_max_position_embeddings
    if config.partial_rotary_factor != 1:
        written["partial_rotary_factor"] = config.partial_rotary_factor
    newer = {**rope, **{k: v for k, v in written.items() if k in ("rope_theta", "partial_rotary_factor")}}
    written["rope_scaling"] = rope if scaling is not None else None
    written["rope_parameters"] = newer
    if family.two_ropes:
        local = config.rope_theta if config.sliding_rope_theta is None else config.sliding_rope_theta
        written["rope_local_base_freq"] = local
        written["rope_parameters"] = {FULL: newer, SLIDING: {"rope_type": "default", "rope_theta": local}}
    return written


def _wanted(names: Any, values: dict[str, Any], kind: str) -> dict[str, Any]:
    if missing := [name for name in names if values.get(name) is None]:
        raise UserError(f"the {kind} rope settings lack {', '.join(missing)}")
    wanted = {name: values[name] for name in names}
    for name, value in wanted.items():
        for one in value if isinstance(value, list) else [value]:
            if check_number(f"the {kind} rope setting {name}", one) == 0 and name == "factor":
                raise UserError(f"the {kind} rope setting factor=0 must be above zero")
    return wanted
