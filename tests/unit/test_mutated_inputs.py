"""A small sample of mutants for every parser; ``python -m tests.kit.parsers`` feeds 50,000 to each."""

from __future__ import annotations

import logging

import pytest

from tests.kit.mutations import Mutator
from tests.kit.parsers import PARSERS, Parser, feed_all

COUNT = 120
OF_TORCH = {"DCP metadata": 20, "Hugging Face files": 60}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_parser_answers_every_mutant_with_a_value_or_an_error_of_ours(parser: Parser) -> None:
    if parser.name in OF_TORCH:
        pytest.importorskip("torch")
    logging.disable(logging.CRITICAL)
    try:
        assert feed_all(parser, count=OF_TORCH.get(parser.name, COUNT), seed=20) == []
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_mutants_are_refused_and_taken_and_the_same_again_from_the_same_seed(parser: Parser) -> None:
    """Else the mutants would be too wild, or too tame, to find anything."""
    if parser.name in OF_TORCH:
        pytest.importorskip("torch")
    again = [repr(parser.mutant(Mutator((parser.name, 1, number)))) for number in range(30)]
    assert again == [repr(parser.mutant(Mutator((parser.name, 1, number)))) for number in range(30)]
    assert len(set(again)) > 15
