"""The same contract for the recommender over every model, and new items on a shop where some came after training."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from support.cold_items import cold_items
from support.recommender_contract import PlantedBlocks, RecommenderContract

from hellm import user_hypergraph
from hellm.config import PretrainConfig, SASRecConfig
from hellm.data import Histories, ItemFeatures
from hellm.evaluate import HistoryScorer
from hellm.losses import bpr_loss
from hellm.models import GraphEncoder, SASRec
from hellm.models.graph.content import ItemContent
from hellm.models.histories import pad_histories
from hellm.models.sequence import TransitionModel, WhitenedContent
from hellm.recommend import (
    Recommender,
    ServedFused,
    ServedGraph,
    ServedLLM,
    ServedModel,
    ServedSASRec,
    ServedTransitions,
)
from hellm.training.transitions import content_pairs


def block_features(data: PlantedBlocks, blocks: np.ndarray) -> np.ndarray:
    """[len(blocks), 8]: the block in one column, and a little noise."""
    noise = np.random.default_rng(len(blocks)).normal(0, 0.05, (len(blocks), 8))
    noise[np.arange(len(blocks)), blocks] += 1
    return noise.astype(np.float32)


def train_on_blocks(model: torch.nn.Module, data: PlantedBlocks, steps: int, loss) -> None:
    """`loss(items, mask)` minimised over the histories in ever new orders: within a block, order means nothing."""
    indptr, items = (torch.from_numpy(one) for one in data.seen)
    padded, mask = pad_histories(indptr, items)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.02)
    with torch.enable_grad():
        for _ in range(steps):
            order = torch.rand(padded.shape, generator=draw).argsort(dim=1)
            optimizer.zero_grad()
            loss(padded.gather(1, order), mask).backward()
            optimizer.step()
    model.eval()


class ServedContract(RecommenderContract):
    """Derive, and give `model`: a served model trained on the planted blocks."""

    bases = ("history",)

    def title(self, item: int) -> str | None:
        return None

    def model(self, data: PlantedBlocks) -> ServedModel:
        raise NotImplementedError

    def fit(self, data, seed=0):
        torch.manual_seed(seed)
        sides = {"user": data.num_users, "item": data.num_items}
        ids = pl.DataFrame(
            [
                (side, row, f"{side[0]}{row}", self.title(row) if side == "item" else None)
                for side, count in sides.items()
                for row in range(count)
            ],
            schema={"side": pl.String, "index": pl.Int64, "id": pl.String, "title": pl.String},
            orient="row",
        )
        users, items = data.train
        histories = pl.DataFrame({"user": users, "item": items, "split": np.zeros(len(users), np.int8)})
        features = block_features(data, data.block_of_item)
        content = ItemContent.of({"text": ItemFeatures.from_values(features)}, k=4)
        return Recommender(self.model(data), ids, histories, content)

    def reload(self, scorer, folder):
        return Recommender.load(scorer.save(folder / "saved"))

    def test_known_users_get_their_planted_item_and_nothing_seen(self, data, scorer):
        lists = scorer.recommend(scorer.user_ids.ids, k=1)
        assert [one.items[0].item for one in lists] == [f"i{item}" for item in data.best_item]
        assert {one.basis for one in lists} == set(self.bases)

    def test_bare_history_gets_the_rest_of_its_block(self, data, scorer):
        (only,) = scorer.recommend(histories=["i0", "i3", "i6"], k=3)
        assert only.basis == "history"
        assert {one.item for one in only} == {"i9", "i12", "i15"}

    def test_empty_history_gets_popular_items(self, data, scorer):
        (only,) = scorer.recommend(histories=[[]], k=2)
        assert only.basis == "popularity"
        assert [one.item for one in only] == [
            f"i{row}" for row in np.argsort(-scorer.popularity.numpy(), kind="stable")[:2]
        ]

    def test_candidates_and_filter(self, data, scorer):
        lists = scorer.recommend(["u0", "u1"], k=5, candidates=["i1", "i2", "i4"], filter=lambda item: item != "i2")
        # Each has one of the two already, or none.
        assert all(len(only.items) > 0 and {one.item for one in only} <= {"i1", "i4"} for only in lists)

    def test_reasons_lie_in_the_block(self, data, scorer):
        (reason,) = scorer.explain("i9", history=["i0", "i1", "i2"], k=1)
        assert reason.item == "i0" and reason.shared_users > 0 and reason.content["text"].similarity > 0.9

    def test_scorer_of_a_device_gives_the_same_scores(self, data, scorer):
        users = torch.arange(data.num_users)
        expected = scorer.scorer("test").scores(users)
        moved = scorer.model.scorer_on("cpu")
        if scorer.model.user is None:
            moved = HistoryScorer(moved, *scorer._current.events.histories).scores
        torch.testing.assert_close(moved(users), expected)

    @pytest.mark.gpu
    def test_scorer_on_the_gpu_gives_the_same_scores_there(self, data):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        recommender, users = self.fit(data), torch.arange(data.num_users)
        expected = recommender.scorer("test").scores(users)
        found = recommender.scorer("test", "cuda").scores if recommender.model.user is None else None
        found = (found or recommender.scorer("test", "cuda"))(users)
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
        # What serves stays on the CPU.
        torch.testing.assert_close(recommender.scores(users), expected, rtol=1e-3, atol=1e-3)
        assert recommender.recommend(["u0"], k=1)[0].items[0].item == f"i{data.best_item[0]}"

    def test_new_items_rank_in_their_block_and_old_scores_stay(self, data, all_scores, tmp_path):
        recommender = self.fit(data)
        recommender.add_items({"text": block_features(data, np.arange(3))}, ["n0", "n1", "n2"], ["a", "b", None])
        scores = recommender.scores(torch.arange(data.num_users))
        torch.testing.assert_close(scores[:, : data.num_items], all_scores, rtol=1e-5, atol=1e-5)
        best = scores[:, data.num_items :].argmax(1).numpy()
        assert (best == data.block_of_user).mean() >= 0.9
        loaded = self.reload(recommender, tmp_path)
        torch.testing.assert_close(loaded.scores(torch.arange(data.num_users)), scores, rtol=1e-5, atol=1e-5)
        assert loaded.item_titles[-3:] == ["a", "b", None]


class TestServedGraph(ServedContract):
    bases = ("user",)

    def model(self, data):
        users, items = map(torch.from_numpy, data.train)
        graph = user_hypergraph(torch.stack([users, items]), data.num_users, data.num_items)
        model = GraphEncoder(data.num_users, data.num_items, user_hypergraph=graph, embedding_dim=8)
        optimizer, draw = torch.optim.Adam(model.parameters(), lr=0.05), torch.Generator().manual_seed(0)
        with torch.enable_grad():
            for _ in range(60):
                output = model()
                negatives = torch.randint(data.num_items, items.shape, generator=draw)
                optimizer.zero_grad()
                bpr_loss(output.user[users], output.item[items], output.item[negatives]).backward()
                optimizer.step()
        output, fold_in = model.eval().embeddings(), model.fold_in_tables()
        tensors = {"user": output.user, "item": output.item}
        tensors |= {"fold_in_source": fold_in.source, "fold_in_view": fold_in.view}
        return ServedGraph(tensors, fold_in.exponent)


class TestServedSASRec(ServedContract):
    def model(self, data):
        return ServedSASRec(sasrec_of_blocks(data, 80))


class TestServedContentSASRec(ServedContract):
    """Items that are known by their content, beside or instead of ids."""

    ways: ClassVar = {"item_id": False, "content_hidden_dim": 16}

    def model(self, data):
        features = torch.from_numpy(block_features(data, data.block_of_item))
        content = {"text": WhitenedContent.of(features)}
        return ServedSASRec(sasrec_of_blocks(data, 200, content=content, **self.ways))


class TestServedSASRecWithContent(TestServedContentSASRec):
    ways: ClassVar = {}


class TestServedFused(ServedContract):
    def model(self, data):
        towers = {"graph": TestServedGraph().model(data), "sequence": TestServedSASRec().model(data)}
        return ServedFused(towers, {"graph": 0.3, "sequence": 1.0})


class TestServedTransitions(ServedContract):
    def model(self, data):
        features = ItemFeatures.from_values(block_features(data, data.block_of_item))
        pairs = content_pairs(ItemContent.of({"text": features}, k=4))
        histories = Histories.of_events(*data.train, data.num_users)
        return ServedTransitions(TransitionModel.fit(histories, data.num_items, similar=pairs, content_weight=0.5))


class TestServedFusedWithTransitions(ServedContract):
    def model(self, data):
        towers = {"sequence": TestServedSASRec().model(data), "transitions": TestServedTransitions().model(data)}
        return ServedFused(towers, {"sequence": 0.3, "transitions": 2.0})


def sasrec_of_blocks(data: PlantedBlocks, steps: int, **settings) -> SASRec:
    shape = {"embedding_dim": 8, "num_layers": 1, "num_heads": 1, "feedforward_dim": 8, "dropout": 0.0}
    model = SASRec(data.num_items, **shape, **settings)

    def loss(items, mask):
        logits = model(items[:, :-1], mask[:, :-1])[mask[:, 1:]] @ model.items().T
        return F.cross_entropy(logits, items[:, 1:][mask[:, 1:]])

    train_on_blocks(model, data, steps, loss)
    return model


class TestServedLLM(ServedContract):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def language_model(cls, tmp_path_factory):
        transformers = pytest.importorskip("transformers", reason='needs pip install "hellm[smollm2]"')
        pytest.importorskip("peft", reason='needs pip install "hellm[smollm2]"')
        folder = tmp_path_factory.mktemp("llama")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = {"<s>": 0, "</s>": 1} | {letter: place for place, letter in enumerate(alphabet, 2)}
        tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(folder)
        cls.folder = folder

    def settings(self, data) -> dict:
        """Further arguments of the model."""
        return {}

    def model(self, data):
        from hellm.models import RecommenderLLM, load_language_model

        draw = torch.Generator().manual_seed(1)
        features = torch.from_numpy(block_features(data, data.block_of_item))
        tables = {"graph": torch.randn(data.num_items, 4, generator=draw), "text": features}
        model = RecommenderLLM(
            *load_language_model(self.folder),
            tables,
            max_length=10,
            num_prefix_tokens=2,
            lora_dropout=0.0,
            **{"lora_rank": 2} | self.settings(data),
        )

        def loss(items, mask):
            query = model.all_queries(items[:, :-1], mask[:, :-1])[mask[:, 1:]]
            return F.cross_entropy(query @ model.item_keys_trainable().T, items[:, 1:][mask[:, 1:]])

        train_on_blocks(model, data, 60, loss)
        return ServedLLM(model, tables)


class TestServedLLMWithTitles(TestServedLLM):
    def title(self, item):
        return "ab" if item % 2 else None

    def settings(self, data):
        titles = [self.title(item) for item in range(data.num_items)]
        # Behind a title only attention knows of the item, and that of a random model must learn to look.
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return {"titles": True, "item_titles": titles, "lora_rank": 4, "lora_targets": targets}


class TestServedLLMWithResidual(TestServedLLM):
    def settings(self, data):
        return {"sequence_residual": True, "sequence_model": sasrec_of_blocks(data, 5)}


@pytest.mark.parametrize("stage", ["pretrain", "sasrec"])
def test_items_that_came_after_training_are_found(stage, tmp_path):
    """Recall of held-out purchases of new items, in lists over old and new items together."""
    from hellm.training.pretrain import pretrain
    from hellm.training.sasrec import train_sasrec

    cold = cold_items(tmp_path, num_users=200, num_items=160)
    run = tmp_path / "run"
    if stage == "pretrain":
        config = PretrainConfig(max_epochs=15, learning_rate=5e-3, num_threads=1)
        pretrain(config, cold.before, run)
    else:
        config = SASRecConfig(max_epochs=30, num_threads=1)
        train_sasrec(config, cold.before, run)
    recommender = Recommender.load(run)
    recommender.add_items(cold.features, cold.ids, cold.titles)
    lists = recommender.recommend(recommender.user_ids.ids, k=20)
    found = [{one.item for one in only} for only in lists]
    wanted = list(zip(cold.users.tolist(), (cold.ids[item] for item in cold.items), strict=True))
    recall = np.mean([item in found[user] for user, item in wanted])
    popular = {one.item for one in recommender.recommend(histories=[[]], k=20)[0]}
    assert not popular & set(cold.ids)
    assert recall > 2 * 20 / recommender.num_items
