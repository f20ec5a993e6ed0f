# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_fuzzing_begins_with(target: str) -> None:
    for data in corpus.seeds(target):
        TARGETS[target](data)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_it_becomes(target: str) -> None:
    """Bytes changed, left out, repeated and put in; ``python -m tests.fuzz`` goes on where this ends."""
    random_ = random.Random(target)
    seeds = corpus.seeds(target)
    for _ in range(300):
        data = bytearray(random_.choice(seeds))
        for _ in range(random_.randrange(1, 6)):
            start, end = sorted(random_.choices(range(len(data) + 1), k=2))
            match random_.randrange(4):
                case 0 if start < len(data):
                    data[start] = random_.randrange(256)
                case 1:
                    del data[start : min(end, start + 8)]
                case 2:
                    data[start:start] = data[start : min(end, start + 64)]
                case _:
                    data[start:start] = random_.choice([b"&#58;", b"\0", b"<nvdimm:domain/>", b"\xff\xff\xff\xff"])
        TARGETS[target](bytes(data))
