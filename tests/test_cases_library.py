import pytest
from cases.library import CASES, result


@pytest.mark.filterwarnings("ignore:the Gram matrix takes one backward pass a sample:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str) -> None:
    good, text = result(name)
    assert good, text
