"""README's command one: the shipped recipe reaches what it promises on held-out phantoms."""

import pytest
from processes import Workplace

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1200)
def test_the_recipe_of_pyproject(workplace: Workplace) -> None:
    run = workplace.simulate({}, sites=3, seconds=1100)
    assert run.status == "finished:completed"
    history = run.history()
    first, last = history[1]["global"], history[-1]["global"]
    assert last["cases"] == 6
    assert last["liver.dice"] >= 0.85
    assert last["tumor.dice"] >= 0.40
    assert last["liver.dice"] > first["liver.dice"]
    assert last["tumor.dice"] > first["tumor.dice"]
    # A kind of phantom that no site has is reported beside it.
    assert history[-1]["unseen"]["cases"] == 2
    assert history[-1]["unseen"]["liver.dice"] > 0.5
