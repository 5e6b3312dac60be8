"""Parts worked out by Ray: as by this process, on two nodes, after a kill, and with errors that say where."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.encoders import TEXTS
from support.planted_runs import DATA, make_run

import hellm.recommend.batch
from hellm import engines
from hellm._files import WriteError
from hellm.data import DataError, load_dataset, write_sample_shop
from hellm.engines import RayEngine, engine_of
from hellm.features import encode_images, encode_text
from hellm.recommend import Recommender
from hellm.recommend.batch import batch

pytestmark = pytest.mark.usefixtures("same_threads")
ROOT = Path(__file__).resolve().parents[1]
PART = 4
NUM_PARTS = -(-DATA.num_users // PART)


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason='needs pip install "hellm[ray]"')


@pytest.fixture(scope="module")
def cluster(ray):
    """Two nodes of one processor each, which this process has joined."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        # Ray's workers would give way to whatever else the machine does.
        settings = {"USAGE_STATS_ENABLED": "0", "AUTH_MODE": "disabled", "TMPDIR": folder, "worker_niceness": "0"}
        for name, value in settings.items():
            patch.setenv(f"RAY_{name}", value)
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        size = {"num_cpus": 1, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
        cluster.add_node(**size)
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            signal.signal(signal.SIGTERM, on_term)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), "sum")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(hellm.recommend.batch, "_PART", PART)


class Noted:
    """A worker that notes each part, its node and its threads in a file, and starts when `num_nodes` are there."""

    def __init__(self, worker, folder: Path, num_nodes: int = 1) -> None:
        self.worker, self.folder, self.num_nodes = worker, folder, num_nodes

    def __call__(self, part):
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"node-{node}").touch()
        until = time.monotonic() + 120
        while len(list(self.folder.glob("node-*"))) < self.num_nodes and time.monotonic() < until:
            time.sleep(0.02)
        result = self.worker(part)
        (self.folder / part[0]).write_text(f"{node} {torch.get_num_threads()}")
        return result

    @staticmethod
    def parts(folder: Path) -> dict[str, list[str]]:
        """Name of each part that was worked out -> its node, and the threads there."""
        return {file.name: file.read_text().split() for file in folder.glob("part-*")}


class Broken:
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __call__(self, part):
        if self.error is None:
            os._exit(1)
        raise self.error


class TestChoice:
    def test_the_engine_of_this_process_is_map(self):
        assert engine_of("local") is map

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (("spark",), "engine must be one of local, ray, got 'spark'"),
            (("local", 2), "workers are of engine ray; engine local has none, got 2"),
            (("ray", 0), "workers must be >= 1, got 0"),
            (("ray", 1, "cuda:1"), "device must be cpu or cuda, as engine ray chooses the GPUs, got 'cuda:1'"),
        ],
    )
    def test_other_arguments_are_refused(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            engine_of(*arguments)

    def test_no_parts_start_nothing(self, ray, monkeypatch):
        monkeypatch.setattr(engines, "_cluster", None)
        assert list(RayEngine()(len, [])) == []

    @pytest.mark.parametrize("verb", ["batch", "features"])
    def test_without_ray_the_extra_is_named(self, verb, run, tmp_path, monkeypatch, fails):
        for name in ("ray", "ray.data"):
            monkeypatch.setitem(sys.modules, name, None)
        fails(verb, run, "--out", tmp_path / "out", "--engine", "ray", match=r'pip install "hellm\[ray\]"')
        assert list(tmp_path.iterdir()) == []


class TestErrors:
    def test_an_error_keeps_its_kind_and_names_the_node(self):
        try:
            raise DataError("a.csv: line 3 must be a number")
        except DataError as error:
            raised = pickle.loads(pickle.dumps(engines._Raised(error, "n1")))
        assert type(raised.error) is DataError
        assert str(raised.error) == "a.csv: line 3 must be a number (worker on node n1)"
        assert "in test_an_error_keeps" in raised.traceback

    def test_where_a_message_does_not_make_one_it_is_of_the_nearest_kind(self):
        raised = pickle.loads(pickle.dumps(engines._Raised(WriteError("a", "full", disk_is_full=True), "n1")))
        assert type(raised.error) is OSError and raised.error.disk_is_full
        assert str(raised.error) == "a cannot be written: full (worker on node n1)"
        broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")
        assert type(engines._Raised(broken, "n1").error) is UnicodeError

    def test_a_file_that_a_node_does_not_see(self):
        raised = engines._Raised(FileNotFoundError("run gone does not exist"), "n1")
        assert str(raised.error).endswith("every node must see files at the same path, on storage that they share")

    def test_versions_must_be_those_of_the_command(self, cluster, ray):
        import pandas as pd

        actor = engines._Actor(ray.put(len), 1, {"hellm": "0", "torch": "0"})
        ((raised,),) = actor(pd.DataFrame({"part": [("a",)]}))["result"]
        with pytest.raises(ValueError, match=r"all nodes must have the versions \{'hellm': '0'.*worker on node"):
            raise raised.error

    def test_what_a_worker_raises_is_raised_here(self, cluster):
        with pytest.raises(ValueError, match=r"part must be good \(worker on node \w{8} \(.+\)\)") as raised:
            list(RayEngine(1)(Broken(ValueError("part must be good")), [1, 2]))
        assert "in __call__" in str(raised.value.__cause__)

    def test_a_worker_whose_process_dies(self, cluster, monkeypatch):
        monkeypatch.setattr(engines, "_RESTARTS", 0)
        with pytest.raises(ChildProcessError, match=r"the Ray cluster lost a worker, and 0 in its place: .*died"):
            list(RayEngine(1)(Broken(None), [1]))

    def test_a_package_that_no_node_has(self, cluster, monkeypatch):
        module = ModuleType("only_here")
        monkeypatch.setitem(sys.modules, "only_here", module)
        exec("class Worker:\n    def __call__(self, part): return part", vars(module))
        with pytest.raises(ValueError, match="must have the packages that are here: No module named 'only_here' there"):
            list(RayEngine(1)(module.Worker(), [1]))

    def test_gpus_that_no_node_has(self, cluster):
        with pytest.raises(ValueError, match="the Ray cluster must have a GPU, and has none on its 2 nodes"):
            list(RayEngine(device="cuda")(len, ["a"]))


class TestRoom:
    """Of nodes with 8, 3 and no processors."""

    @pytest.fixture(autouse=True)
    def nodes(self, ray, monkeypatch):
        nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in (8.0, 3.0)]
        nodes += [{"Alive": True, "Resources": {"GPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 9.0, "GPU": 9.0}}]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)

    @pytest.mark.parametrize(("threads", "workers", "share"), [(1, 11, 1), (2, 5, 2), (4, 2, 4), (16, 1, 8)])
    def test_a_worker_takes_as_many_processors_as_it_has_threads(self, threads, workers, share):
        assert engines._room(threads, on_gpu=False) == (workers, {"num_cpus": share})

    def test_a_worker_takes_a_gpu(self):
        assert engines._room(4, on_gpu=True) == (2, {"num_gpus": 1})


class TestLists:
    def test_two_nodes_write_what_this_process_writes(self, run, tmp_path, cluster, ray):
        """With as many threads, though a node has one processor."""
        torch.set_num_threads(2)
        visitors = tmp_path / "visitors.jsonl"
        histories = [f'["p{row % DATA.num_items}", "gone"]\n' for row in range(5 * PART + 1)]
        visitors.write_text("[]\n" + "".join(histories))
        notes = tmp_path / "notes"
        notes.mkdir()

        def engine(worker, parts):
            return RayEngine()(Noted(worker, notes, num_nodes=2), parts)

        before = batch(run, tmp_path / "local.parquet", visitors, k=3)
        report = batch(run, tmp_path / "ray.parquet", visitors, k=3, engine=engine)
        assert report == before | {"out": report["out"]}
        assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()
        found = Noted.parts(notes)
        assert len(found) == 6 and {node for node, _ in found.values()} == {node["NodeID"] for node in ray.nodes()}
        assert len(ray.nodes()) == 2 and {threads for _, threads in found.values()} == {"2"}
        assert not list(tmp_path.glob("*.parts"))

    def test_a_killed_command_goes_on(self, run, tmp_path, cluster):
        """The kill is real, the second command takes up the parts that are there, and the file is that of one go."""
        out, notes, again = tmp_path / "lists.parquet", tmp_path / "notes", tmp_path / "again"
        notes.mkdir()
        again.mkdir()
        program = (
            "import sys, time\n"
            "from pathlib import Path\n"
            "import hellm.recommend.batch as b\n"
            "from hellm.engines import RayEngine\n"
            f"b._PART = {PART}\n"
            "class Slow:\n"
            "    def __init__(self, worker): self.worker = worker\n"
            "    def __call__(self, part):\n"
            "        result = self.worker(part)\n"
            "        Path(sys.argv[3], part[0]).touch()\n"
            "        time.sleep(0.5)\n"
            "        return result\n"
            "b.batch(sys.argv[1], sys.argv[2], k=3, engine=lambda worker, parts: RayEngine(1)(Slow(worker), parts))\n"
        ).replace("sys.argv[3]", repr(str(notes)))
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        killed = subprocess.Popen([sys.executable, "-c", program, run, out], env=environment, stderr=subprocess.PIPE)
        until = time.monotonic() + 120
        while len(list(notes.iterdir())) < 2 and killed.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL, killed.stderr.read().decode()
        finished = {file.name for file in Path(f"{out}.parts").glob("part-*.parquet")}
        assert 2 <= len(finished) < NUM_PARTS and not out.exists()

        def engine(worker, parts):
            return RayEngine(1)(Noted(worker, again), parts)

        report = batch(run, out, k=3, resume=True, engine=engine)
        assert report["resumed_at"] >= PART * len(finished) and report["lists"] == DATA.num_users
        assert Noted.parts(again) and not finished & Noted.parts(again).keys()
        batch(run, tmp_path / "whole.parquet", k=3)
        assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()

    def test_folders_that_workers_do_not_see(self, run, tmp_path, cluster, monkeypatch):
        """This process's working directory is another folder in every other one."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"lists\.parquet\.parts must hold the parts .* storage that they"):
            batch(run, "/proc/self/cwd/lists.parquet", engine=RayEngine(1))
        assert list(tmp_path.iterdir()) == []

    def test_a_worker_writes_into_the_folder_of_its_request_alone(self, run, tmp_path, monkeypatch):
        class Stop(Exception):
            pass

        fresh, loaded = {}, {}

        def engine(worker, parts):
            k, part = worker.options["k"], next(iter(parts))
            worker(part)
            fresh[k], loaded[k] = pickle.loads(pickle.dumps(worker)), pickle.loads(pickle.dumps(worker))
            assert loaded[k](part) == PART
            raise Stop

        for k in (3, 4):
            with pytest.raises(Stop):
                batch(run, tmp_path / "lists.parquet", k=k, overwrite=k == 4, engine=engine)
        part = ("part-000001.parquet", next(iter(hellm.recommend.batch._asked(Recommender.load(run), None))))
        for late in (fresh[3], loaded[3]):
            with pytest.raises(ValueError, match="k was 4, got 3"):
                late(part)
        monkeypatch.setattr(hellm.recommend.batch, "run_hash", lambda run: "another")
        with pytest.raises(ValueError, match=r"must be run \w{16}, as where the batch was started, got another"):
            fresh[4](part)

    def test_a_part_that_is_not_here_is_named(self, run, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"part-000000.parquet was written by a worker and is not here"):
            batch(run, tmp_path / "lists.parquet", k=3, engine=lambda worker, parts: [PART for _ in parts])
        assert list(tmp_path.iterdir()) == []


class TestFeatures:
    def test_encoders_go_by_value_and_rows_come_in_any_order(self, text_encoder, image_encoder, tmp_path, ray):
        from PIL import Image

        pictures = [tmp_path / f"{row}.png" for row in range(6)]
        draw = np.random.default_rng(0)
        for file in pictures[:4]:
            Image.fromarray(draw.integers(0, 255, (20, 24, 3), np.uint8)).save(file)
        pictures[4].write_bytes(b"no picture")

        def elsewhere(worker, parts):
            other = pickle.loads(ray.cloudpickle.dumps(worker))
            for part in reversed(list(parts)):
                yield pickle.loads(pickle.dumps(other(pickle.loads(pickle.dumps(part)))))

        def encoded(engine):
            told = []
            options = {"batch_size": 2, "engine": engine}
            texts = encode_text(TEXTS, encoder=text_encoder, **options)
            images = encode_images(
                [*pictures, ""], encoder=image_encoder, on_unreadable=lambda *one: told.append(one), **options
            )
            return texts, images, [(path, str(error)) for path, error in told]

        (*features, told), (*others, told_there) = encoded(map), encoded(elsewhere)
        for one, other in zip(features, others, strict=True):
            np.testing.assert_array_equal(other.values, one.values)
            np.testing.assert_array_equal(other.mask, one.mask)
        assert told_there == told and [path for path, _ in told] == [str(pictures[4]), str(pictures[5])]

    def test_rows_that_came_before_an_error_are_kept(self, text_encoder, tmp_path):
        def engine(worker, parts):
            for number, part in enumerate(parts):
                if number == 2:
                    raise ChildProcessError
                yield worker(part)

        with pytest.raises(ChildProcessError):
            encode_text(TEXTS, encoder=text_encoder, batch_size=1, cache=tmp_path, engine=engine)
        left = []
        encode_text(
            TEXTS, encoder=text_encoder, batch_size=1, cache=tmp_path, engine=lambda _, parts: left.extend(parts) or []
        )
        assert len(left) == len({text.strip() for text in TEXTS} - {""}) - 2

    def test_a_picture_that_is_gone_where_it_is_read(self, image_encoder, tmp_path):
        from PIL import Image

        Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")

        def engine(worker, parts):
            for part in parts:
                (tmp_path / "a.png").unlink()
                yield worker(part)

        with pytest.raises(FileNotFoundError, match=r"a\.png"):
            encode_images([tmp_path / "a.png"], encoder=image_encoder, engine=engine)


class TestCommands:
    def test_lists_without_a_cluster(self, run, tmp_path, ray, monkeypatch):
        """Ray is started for the command and gone after it."""
        monkeypatch.undo()
        batch(run, tmp_path / "local.parquet", k=3)
        with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
            monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
            environment |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
            argv = [sys.executable, "-m", "hellm", "batch", run, "-k", "3", "--out", tmp_path / "ray.parquet"]
            argv += ["--engine", "ray", "--workers", "1"]
            done = subprocess.run(argv, env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and f"{DATA.num_users} lists" in done.stdout, done.stderr
            processes = subprocess.run(["pgrep", "-f", folder], capture_output=True, text=True)
            assert not processes.stdout
        assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()

    def test_features_of_a_shop(self, tmp_path, call, text_encoder, cluster):
        shop, found = write_sample_shop(tmp_path / "shop", num_users=20, num_items=20, num_groups=1), []
        for engine in ("local", "ray"):
            argv = ["features", shop, "--out", tmp_path / engine, "--cache", tmp_path / "cache" / engine]
            code, _, err = call(*argv, "--engine", engine, "--text", text_encoder, "--image", "none", "--batch-size", 4)
            assert code == 0, err
            found.append(load_dataset(tmp_path / engine))
        local, other = found
        assert other.notes == local.notes and other.encoders == local.encoders
        np.testing.assert_array_equal(other.item_features["text"].values, local.item_features["text"].values)
        np.testing.assert_array_equal(other.item_features["text"].mask, local.item_features["text"].mask)
