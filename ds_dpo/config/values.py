"""What a written value means for its field: the one place for files and the command line."""

from __future__ import annotations

from typing import Any

from ds_dpo.config.base import UNSETTING
from ds_dpo.config.fields import FieldSpec
from ds_dpo.config.plain_scalar import Plain
from ds_dpo.errors import ConfigError


def settled(spec: FieldSpec, written: Any) -> Any:
    """Return the value of a field: None, a truth value, a number, text, or a list of these.

    written: a Plain, quoted text, or a list of them. A field of text gets a Plain's text, and none empties a list.
    Raises ConfigError for an empty text, and for none where the field must have a value. Whether a value fits is
    checked later, by RunConfig.
    """
    if not isinstance(written, list):
        return _settled_alone(spec, written)
    if spec.is_list and len(written) == 1 and _is_none(written[0]):
        return []
    return [_of_kind(spec, part) for part in written]


def _settled_alone(spec: FieldSpec, written: Any) -> Any:
    if not _is_none(written):
        value = _of_kind(spec, written)
        if isinstance(value, str) and not value.strip():
            unset = ", or none to unset it" if spec.is_optional else ""
            raise ConfigError(f"{spec.path} is empty; give a value{unset}")
        return value
    if spec.is_optional:
        return None
    if "none" in spec.choices:
        return "none"
    if spec.is_list:
        return []
    default = "" if spec.default is None else f"; leave it out for {str(spec.default).lower()}"
    raise ConfigError(f"{spec.path} = none: the option must have a value{default}")


def _is_none(written: Any) -> bool:
    if isinstance(written, Plain) and written.value is None:
        return True
    return isinstance(written, Plain | str) and str(written).lower() in UNSETTING


def _of_kind(spec: FieldSpec, written: Any) -> Any:
    """Return a value as the field's kind asks: the text of a word, or its meaning."""
    if isinstance(written, str) and "\0" in written:
        raise ConfigError(f"{spec.path} = {written!r}: a text cannot contain a NUL character")
    if not isinstance(written, Plain):
        return meant(written)
    if spec.kind is str:
        is_word = isinstance(written.value, bool) and written.text.lower() in spec.choices
        return written.text.lower() if is_word else None if written.value is None else written.text
    if isinstance(written.value, bool) and spec.kind is not bool:
        raise ConfigError(f"{spec.path} = {written}: the option is not a switch that can be true or false")
    return written.value


def meant(written: Any) -> Any:
    """Return what is written, with the meaning of each Plain inside."""
    if isinstance(written, dict):
        return {str(name): meant(value) for name, value in written.items()}
    if isinstance(written, list):
        return [meant(part) for part in written]
    return written.value if isinstance(written, Plain) else written
