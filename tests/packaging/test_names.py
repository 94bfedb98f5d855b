"""What the package's names mean."""

import importlib

import pytest

import rhtcomm


def test_plan_is_a_function_and_no_module() -> None:
    assert callable(rhtcomm.plan)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rhtcomm.plan")
    assert callable(rhtcomm.plan)
