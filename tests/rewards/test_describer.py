"""What objects within an objective are identified by: content where it is the same in every process, else the class."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from mavis.rewards import objective_identity
from mavis.rewards.describer import _package_version
from tests.hash_seeds import printed_under_hash_seeds


class Holder:
    """An objective that refers to something."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [0.0] * len(responses)


def identity(held: Any) -> str:
    return objective_identity(Holder(held))


class Words(dict[str, float]):
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [sum(self.get(word, 0.0) for word in response.split()) for response in responses]


class OtherWords(dict[str, float]):
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [max(self.get(word, 0.0) for word in response.split()) for response in responses]


def nested(value: int) -> Any:
    data: Any = value
    for _ in range(30):
        data = [data]
    return data


def network(slope: float) -> Any:
    return torch.nn.Sequential(torch.nn.LeakyReLU(slope))


def array_of_objects(value: int) -> Any:
    return np.array([Holder(value), None], dtype=object)


@pytest.mark.parametrize(
    ("make", "one", "two"),
    [
        (Decimal, 1, 2),
        (Fraction, 1, 2),
        (range, 1, 2),
        (deque, [1], [2]),
        (Counter, "a", "b"),
        (OrderedDict, {"a": 1}, {"a": 2}),
        (lambda value: SimpleNamespace(scale=value), 1, 2),
        (lambda value: torch.tensor([value]), 1j, 2j),
        (Words, {"a": 1.0}, {"a": 2.0}),
        (nested, 1, 2),
        (network, 0.1, 0.2),
        (array_of_objects, 1, 2),
    ],
)
def test_data_and_modules_are_their_content(make: Callable[[Any], Any], one: Any, two: Any) -> None:
    assert identity(make(one)) == identity(make(one)) != identity(make(two))


def made_by(rule: str, kind: str) -> Any:
    """Return an object whose method is made of a rule by what the standard library offers for that."""
    source = f"""
import functools
def rule(self, *rest): return {rule}
class Made:
    value = functools.cached_property(rule)
    part = functools.partialmethod(rule, 1)
    sent = functools.singledispatchmethod(rule)
    given = property(rule)
class Kept:
    {kind} = vars(Made)["{kind}"]
"""
    namespace: dict[str, Any] = {"__name__": "own"}
    exec(source, namespace)
    return namespace["Kept"]()


@pytest.mark.parametrize("kind", ["value", "part", "sent", "given"])
def test_the_code_of_every_kind_of_method_counts(kind: str) -> None:
    assert identity(made_by("2", kind)) == identity(made_by("2", kind)) != identity(made_by("3", kind))


class Slotted:
    __slots__ = "scale"

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Hidden:
    __slots__ = ("__scale",)

    def __init__(self, scale: float) -> None:
        self.__scale = scale


@pytest.mark.parametrize("make", [Slotted, Hidden])
def test_slots_are_attributes(make: Callable[[float], Any]) -> None:
    assert identity(make(1.0)) == identity(make(1.0)) != identity(make(2.0))


def test_tables_and_functions_within_objects_of_packages_count() -> None:
    def frame(score: float) -> Any:
        return pandas.DataFrame({"word": ["good"], "score": [score]})

    def vectorised(scale: float) -> Any:
        return np.vectorize(lambda value: scale * value)

    for make in (frame, vectorised):
        assert identity(make(1.0)) == identity(make(1.0)) != identity(make(2.0)), make
    assert identity(frame(1.0)) != identity(frame(1.0).rename(columns={"word": "text"}))


class Named:
    def identity(self) -> str:
        return "named"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [0.0] * len(responses)


def test_a_subclass_does_not_hide_behind_the_identity_that_it_inherits() -> None:
    class Other(Named):
        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            return [1.0] * len(responses)

    assert objective_identity(Named()) == objective_identity(Named()) != objective_identity(Other())


def test_the_class_of_a_container_and_of_a_module_counts() -> None:
    class Twice(torch.nn.Linear):
        factor = 2

    class Thrice(torch.nn.Linear):
        factor = 3

    assert objective_identity(Words(a=1.0)) != objective_identity(OtherWords(a=1.0))
    twice, thrice = Twice(1, 1), Thrice(1, 1)
    thrice.load_state_dict(twice.state_dict())
    assert identity(twice) != identity(thrice)


def test_the_options_of_a_module_of_ones_own_count() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, unit: str) -> None:
            super().__init__()
            self.unit = unit

    assert identity(Scaled("words")) == identity(Scaled("words")) != identity(Scaled("characters"))


def test_a_tensor_whose_content_cannot_be_read_is_its_type() -> None:
    assert identity(torch.zeros(2, device="meta")) == identity(torch.zeros(2, device="meta"))
    assert identity(torch.nn.LazyLinear(2)) == identity(torch.nn.LazyLinear(2))
    assert identity(torch.eye(2).to_sparse()) == identity(torch.eye(2).to_sparse())


def classifier(seed: int) -> Any:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(seed)
    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=300, pad_token_id=0)
    return GPT2ForSequenceClassification(config).eval()


@pytest.fixture
def pipeline(tiny_tokenizer: Any) -> Callable[..., Any]:
    """A function that makes a pipeline of a tiny classifier with weights of a seed."""
    from transformers import pipeline

    def make(seed: int = 0, **options: Any) -> Any:
        return pipeline("text-classification", model=classifier(seed), tokenizer=tiny_tokenizer, **options)

    return make


def test_a_pipeline_is_its_model_and_its_options(pipeline: Callable[..., Any]) -> None:
    assert identity(pipeline(0)) == identity(pipeline(0)) != identity(pipeline(1))
    assert identity(pipeline(top_k=None)) != identity(pipeline(top_k=1))
    assert identity(pipeline(function_to_apply="sigmoid")) != identity(pipeline(function_to_apply="none"))
    assert identity(pipeline(batch_size=2)) == identity(pipeline())
    renamed = pipeline()
    renamed.model.config.id2label = {0: "bad", 1: "good"}
    assert identity(renamed) != identity(pipeline())


def test_a_pipeline_is_the_same_after_it_has_scored(pipeline: Callable[..., Any]) -> None:
    used = pipeline()
    used(["the dog"])
    assert identity(used) == identity(pipeline())


def of_package(**attributes: Any) -> Any:
    """An object of a class of an installed package, which stores anything."""
    from transformers import Trainer

    found = Trainer.__new__(Trainer)
    vars(found).update(attributes)
    return found


def test_an_object_of_a_package_is_the_models_and_arrays_that_it_holds(pipeline: Callable[..., Any]) -> None:
    for make in (
        classifier,
        pipeline,
        lambda seed: [{"step": classifier(seed)}],
        lambda seed: of_package(model=classifier(seed)),
        lambda seed: of_package(weights=np.array([seed])),
        lambda seed: {"weights": torch.tensor([seed])},
    ):
        assert identity(of_package(held=make(0))) == identity(of_package(held=make(0)))
        assert identity(of_package(held=make(0))) != identity(of_package(held=make(1)))


def test_what_else_an_object_of_a_package_holds_may_differ_between_processes() -> None:
    bare = identity(of_package())
    assert identity(of_package(number=1, name="0x7f", when={"then": 2.5}, own=Holder(3))) == bare
    workspace = of_package(engine=of_package(runner=of_package(cache=torch.rand(3))))
    assert identity(workspace) == bare
    itself = of_package()
    itself.itself = itself
    assert identity(itself) == bare


def test_the_version_of_a_package_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def identities() -> list[str]:
        _package_version.cache_clear()
        return [identity(safetensors), identity(safetensors.torch.save_file), identity(safetensors.SafetensorError)]

    before = identities()
    monkeypatch.setattr(safetensors, "__version__", f"{safetensors.__version__}+build")
    assert identities() == before
    monkeypatch.setattr(safetensors, "__version__", "0.0")
    assert not set(identities()) & set(before)
    monkeypatch.undo()
    assert identities() == before


def test_the_version_of_what_mavis_itself_computes_with_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity([np, np.linalg.norm, torch.nn.functional.cosine_similarity])
    _package_version.cache_clear()
    monkeypatch.setattr(np, "__version__", "0.0")
    assert identity([np, np.linalg.norm, torch.nn.functional.cosine_similarity]) == before


MODULE = """
import concurrent.futures, functools, io, itertools, logging, operator
import queue, random, tempfile, threading, uuid, weakref
import numpy as np
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, pipeline
from transformers import AutoTokenizer

torch.manual_seed(0)
CONFIG = GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=300, pad_token_id=0)
MODEL = GPT2ForSequenceClassification(CONFIG).eval()
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
PIPELINE = pipeline("text-classification", model=MODEL, tokenizer=TOKENIZER)
UNSTABLE = [
    random.Random(), np.random.default_rng(), np.random.RandomState(), torch.Generator(), random.SystemRandom(),
    threading.Lock(), threading.RLock(), threading.Thread(), threading.local(), threading.Event(),
    concurrent.futures.ThreadPoolExecutor(), tempfile.TemporaryFile(), io.StringIO(str(uuid.uuid4())), queue.Queue(),
    logging.getLogger("x"), uuid.uuid4(), object(), itertools.count(), weakref.ref(MODEL), operator.itemgetter(0),
    tempfile.TemporaryDirectory(), iter([object()]),
]
RANDOM, LOCK, MEMO = random.Random(), threading.Lock(), {}

@functools.lru_cache
def loaded(name):
    return pipeline("text-classification", model=MODEL, tokenizer=TOKENIZER)

def objective(prompts, responses):
    with LOCK:
        RANDOM.random()
        return [MEMO.setdefault(r, PIPELINE(r)[0]["score"] + loaded("x")(r)[0]["score"]) for r in responses]

class Objective:
    def __init__(self):
        self.unstable, self.pipeline, self.lazy = UNSTABLE, PIPELINE, None

    def __call__(self, prompts, responses):
        self.lazy = self.lazy or loaded("x")
        return objective(prompts, responses)
"""


def test_what_differs_between_processes_is_left_out(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "unstable.py").write_text(MODULE.replace("FOLDER", repr(str(tmp_path / "tokenizer"))))
    code = (
        "import unstable as m; from mavis.rewards import objective_identity as i, score\n"
        "objectives = {'function': m.objective, 'object': m.Objective()}\n"
        "before = list(map(i, objectives.values()))\n"
        "score(objectives, ['p'], ['the dog'])\n"
        "score(objectives, ['p'], ['she said'])\n"
        "assert m.MEMO and list(map(i, objectives.values())) == before\n"
        "print(before)"
    )
    assert len(printed_under_hash_seeds(code, tmp_path)) == 1
