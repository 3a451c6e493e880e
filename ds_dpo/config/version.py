"""The version of ds_dpo, which setup.py and `--version` read here."""

VERSION = "0.1.0"


def version_text() -> str:
    """Return what --version prints."""
    return f"ds_dpo {VERSION}"
