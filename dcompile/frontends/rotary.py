"""The keys of rotary embedding, which stand in any of three places of a config."""

from __future__ import annotations

from dcompile.frontends.base import Config

KEYS = ("rope_theta", "partial_rotary_factor", "rotary_dim")
OBJECTS = ("rope_scaling", "rope_parameters")  # the other two places


def rope_theta(config: Config) -> float:
    """The rotary base; scaled variants of rotary embedding are refused."""
    return _gathered(config).number("rope_theta")


def rotary_dim(config: Config, head_dim: int, share: float | None = None) -> int:
    """How many of a head's dimensions turn, an even number; `share` where the config says none."""
    keys = _gathered(config)
    stated = [key for key in KEYS[1:] if keys.given(key)]
    if stated == ["rotary_dim"]:
        dim = keys.size("rotary_dim")
    else:
        dim = int(head_dim * keys.number("partial_rotary_factor", share))
    if not 2 <= dim <= head_dim or dim % 2:
        what = f"an even number of rotary dimensions in heads of {head_dim}"
        raise keys.error(stated[0], what) if stated else config.error("head_dim", what)
    keys.only("rotary_dim", dim, why=f"'partial_rotary_factor' says so of heads of {head_dim}")
    return dim


def whole_heads(config: Config, head_dim: int) -> int:
    """`head_dim`, in families whose authors' code turns all of it."""
    keys, why = _gathered(config), "the authors' code turns whole heads"
    keys.only("partial_rotary_factor", 1, why=why)
    keys.only("rotary_dim", head_dim, why=why)
    return rotary_dim(config, head_dim, 1.0)


def _gathered(config: Config) -> Config:
    """The rotary keys alone, wherever they stand; where one stands twice, both must agree."""
    found = {key: config.get(key) for key in KEYS if config.given(key)}
    for place in OBJECTS:
        inside = config.get(place) or {}
        if not isinstance(inside, dict):
            raise config.error(place, "null or an object")
        kind = inside.get("rope_type", inside.get("type", "default"))
        if kind != "default" or set(inside) - {"rope_type", "type", *KEYS}:
            raise config.error(place, "null: scaled rotary embedding is not supported")
        for key in KEYS:
            value = inside.get(key)
            if value is not None and found.setdefault(key, value) != value:
                raise config.error(place, f"{key!r} as elsewhere in the config, {found[key]!r}")
    return Config(found, config.file)
