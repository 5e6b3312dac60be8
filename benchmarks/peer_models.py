"""Models of other libraries on the events of a file; without hellm, in an environment of their own.

python peer_models.py MODEL EVENTS OUT EPOCHS: EVENTS is an .npz with "train" and "known" [2, N] int64 (user, item), in
time order; OUT an .npz with "lists" [U, 20] int64 (nothing masked) and "seconds" of every epoch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

LENGTH = 20
Found = tuple[np.ndarray, list[float]]


def rectools_sasrec(train: np.ndarray, known: np.ndarray, epochs: int) -> Found:
    """RecTools' SASRec with its softmax loss, sizes as `hellm sasrec` has them."""
    import pandas as pd
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    seconds: list[float] = []

    class Times(Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            seconds.append(time.perf_counter() - self.started)

    def dataset(events: np.ndarray) -> Dataset:
        frame = pd.DataFrame({Columns.User: events[0], Columns.Item: events[1], Columns.Weight: 1.0})
        frame[Columns.Datetime] = pd.Timestamp("2020-01-01") + pd.to_timedelta(np.arange(len(frame)), unit="s")
        return Dataset.construct(frame)

    def trainer() -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        return Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[Times()], **quiet)

    model = SASRecModel(
        n_factors=64,
        n_blocks=2,
        n_heads=2,
        dropout_rate=0.5,
        session_max_len=50,
        loss="softmax",
        batch_size=128,
        epochs=epochs,
        get_trainer_func=trainer,
    )
    model.fit(dataset(train))
    users = np.unique(known[0])
    found = model.recommend(users=users, dataset=dataset(known), k=LENGTH, filter_viewed=False)
    lists = np.full((known[0].max() + 1, LENGTH), -1)
    lists[found[Columns.User], found[Columns.Rank] - 1] = found[Columns.Item]
    return lists, seconds


def pyg_lightgcn(train: np.ndarray, known: np.ndarray, epochs: int) -> Found:
    """PyTorch Geometric's LightGCN with its BPR loss, a negative for every event, as its example trains it."""
    import torch
    from torch_geometric.nn import LightGCN

    torch.manual_seed(0)
    num_users, num_items = (int(known[side].max()) + 1 for side in (0, 1))
    pairs = torch.from_numpy(train) + torch.tensor([[0], [num_users]])
    edges = torch.cat([pairs, pairs.flip(0)], 1)
    model = LightGCN(num_users + num_items, 64, num_layers=2)
    optimizer, seconds = torch.optim.Adam(model.parameters(), lr=0.001), []
    for _ in range(epochs):
        started = time.perf_counter()
        for rows in torch.randperm(pairs.shape[1]).split(8192):
            positive = pairs[:, rows]
            negative = torch.stack([positive[0], torch.randint(num_users, num_users + num_items, (len(rows),))])
            ranks = model(edges, torch.cat([positive, negative], 1))
            loss = model.recommendation_loss(*ranks.chunk(2), node_id=torch.cat([positive, negative], 1).unique())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        user, item = model.get_embedding(edges).split([num_users, num_items])
        lists = torch.cat([(rows @ item.T).topk(LENGTH).indices for rows in user.split(1024)])
    return lists.numpy(), seconds


def implicit_bpr(train: np.ndarray, known: np.ndarray, epochs: int) -> Found:
    """implicit's BPR with its own settings, but 64 columns."""
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    num_users, num_items = (int(known[side].max()) + 1 for side in (0, 1))
    matrix = csr_matrix((np.ones(train.shape[1], np.float32), train), (num_users, num_items))
    model = BayesianPersonalizedRanking(factors=64, iterations=epochs, random_state=0)
    started = time.perf_counter()
    model.fit(matrix, show_progress=False)
    seconds = [(time.perf_counter() - started) / epochs] * epochs
    options = {"N": LENGTH, "filter_already_liked_items": False}
    lists, _ = model.recommend(np.arange(num_users), matrix, **options)
    return lists, seconds


MODELS: dict[str, Callable[[np.ndarray, np.ndarray, int], Found]] = {
    "rectools-sasrec": rectools_sasrec,
    "pyg-lightgcn": pyg_lightgcn,
    "implicit-bpr": implicit_bpr,
}

if __name__ == "__main__":
    _, name, events, out, num_epochs = sys.argv
    with np.load(events) as given:
        found, taken = MODELS[name](given["train"], given["known"], int(num_epochs))
    np.savez(out, lists=np.asarray(found, np.int64), seconds=np.array(taken))
