"""Options and settings for all tests."""

import pytest
from hypothesis import settings

settings.register_profile("assay", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("assay")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long sweeps too")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the long sweeps were asked for."""
    return bool(request.config.getoption("--full"))
