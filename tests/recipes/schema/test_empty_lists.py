"""A list that is dealt out among clients has something in it."""

from __future__ import annotations

import pytest

from lichen.core.errors import LichenError
from lichen.recipes.schema.read import read_recipe


@pytest.mark.parametrize("key", ["ranks", "memory"])
def test_an_empty_list_is_refused_by_its_key(key: str) -> None:
    with pytest.raises(LichenError) as error:
        read_recipe("chat-demo", [f"federation.{key}=[]"])
    assert error.value.where == f"federation.{key}"
    assert error.value.fix
