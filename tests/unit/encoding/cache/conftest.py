"""The miniature's models, loaded once for each file of tests, and one finished cache for all files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from small_pair_cache import config, make

from ds_dpo.encoding.cache.pairs import PairCache
from ds_dpo.models.loading import load_text, load_vae


@pytest.fixture(scope="module", autouse=True)
def _models_are_loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_dpo.encoding.cache.unit.load_vae", cache_of_function(load_vae))
        patch.setattr("ds_dpo.encoding.cache.unit.load_text", cache_of_function(load_text))
        yield


def cache_of_function(function: Any) -> Any:
    found: dict[str, Any] = {}

    def load(model: Any, **options: Any) -> Any:
        key = f"{model}{options}"
        if key not in found:
            found[key] = function(model, **options)
        return found[key]

    return load


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> PairCache:
    """A finished cache in fp32 with mirrored images; no test changes it."""
    return make(tmp_path_factory.mktemp("exact") / "cache", config("--data.flip", "independent"))
