"""Training by several processes, each of which is a worker of a `MultiWorkerMirroredStrategy`."""

import itertools
import random
import socket

import numpy as np
import pytest
from cases import assert_same_weights, weights_of
from workers import crashes, exchanges, files, laws
from workers.harness import Team, WorkerError, free_ports


@pytest.fixture(scope="module")
def make_team(tmp_path_factory):
    """Gives a team of so many workers; it is started when it is first asked for."""
    teams = {}

    def get(size):
        if size not in teams or not teams[size].is_running:
            for other in teams.values():  # none takes the processors from another
                other.stop()
            teams[size] = Team(size, tmp_path_factory.mktemp("workers")).start()
        return teams[size]

    yield get
    for team in teams.values():
        team.stop()


TWO, THREE = 2, 3
#: What the number of workers may make a difference to.
OF_THREE = ["batches", "both", "no rows", "sparse", "skipped micro-batches"]


@pytest.fixture
def team(make_team):
    """Two workers."""
    return make_team(TWO)


def assert_same_bits(results):
    """All workers have ended with the same."""
    first = results[0]
    for result in results:
        for ours, other in zip(result["weights"], first["weights"]):
            assert ours.tobytes() == other.tobytes()
        assert {**result, "weights": []} == {**first, "weights": []}


class Trained:
    """The weights of a result, as of a model."""

    def __init__(self, result):
        self.get_weights = lambda: result["weights"]


def assert_law(results, plain, start, tolerance=1e-9):
    """All workers have ended with the same, which is what the plain model has ended with."""
    assert_same_bits(results)
    assert_same_weights(Trained(results[0]), plain, start, tolerance)
    assert results[0]["iterations"] == int(plain.optimizer.iterations)


def assert_same_statistics(model, plain, start):
    """Moving statistics are those of the plain model; what is trained is outside of the law."""
    names = [weight.name for weight in plain.weights]
    moving = [place for place, name in enumerate(names) if "moving" in name]
    assert len(moving) == 2
    for place in moving:
        theirs = weights_of(plain)[place]
        assert np.abs(theirs - start[place]).max() > 1e-2
        np.testing.assert_allclose(model.get_weights()[place], theirs, rtol=1e-9)


# ---- the law -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            pytest.param(name, TWO, marks=[pytest.mark.long] if law.is_long else [])
            for name, law in laws.LAWS.items()
        ),
        *(pytest.param(name, THREE, marks=pytest.mark.long) for name in OF_THREE),
    ],
)
def test_the_law(make_team, name, size):
    """All workers end with the weights of the plain model on whole windows."""
    team = make_team(size)
    law = laws.LAWS[name]
    team.begin("laws.train", name=name)
    plain, start = laws.plain(law, team.size)
    results = team.results()
    skipped = [result.pop("skipped") for result in results]
    assert_law(results, plain, start)
    pending = law.epochs * sum(law.batches) % 3 if "carry" in law.options.values() else 0
    spoilt = law.epochs * len({window for window, _ in law.spoilt})
    assert results[0]["pending"] == pending
    if name == "skipped micro-batches":  # each worker knows its own
        assert [sum(counts) for counts in zip(*skipped)] == [0, spoilt]
    else:
        assert skipped == [[spoilt, 0]] * team.size


@pytest.mark.usefixtures("float64")
def test_fit_on_arrays(team):
    """TensorFlow shares the rows out: the last batch leaves some workers without any."""
    team.begin("laws.fit_arrays")
    plain, start = laws.fit_arrays_plainly()
    assert_law(team.results(), plain, start)


@pytest.mark.usefixtures("float64")
def test_pooled_statistics_are_of_all_workers(team):
    """Moving statistics of the first layer are those of all the rows of a window."""
    team.begin("laws.pool")
    plain, start = laws.plain(laws.NORMED, team.size)
    results = team.results()
    assert_same_bits(results)
    assert_same_statistics(Trained(results[0]), plain, start)


def test_all_workers_scale_losses_alike(team):
    """In mixed precision the loss scale is that of all, also where one overflows."""
    results = team.do("laws.scale_losses")
    for result in results:
        del result["start"]
    assert_same_bits(results)
    assert results[0]["skipped"] == [1, 0]
    assert results[0]["iterations"] == 5
    scales = results[0]["scales"][2::3]
    assert scales == [2.0**15, 2.0**16, 2.0**16, 2.0**15, 2.0**15, 2.0**16]
    assert all(np.isfinite(weight).all() for weight in results[0]["weights"])


# ---- exchanges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("batches", "two dtypes") else [pytest.mark.long])
        for name in exchanges.WAYS
    ],
)
def test_gradients_are_exchanged_once_an_update(team, name):
    """Beside what plain tf_keras exchanges for its metrics, nothing is in the batches between."""
    for found in team.do("exchanges.exchanged", name=name):
        ours, plain = found["converted"], found.get("plain")
        between = [each for each in ours["graph"] if not each[2]]
        updates = [each for each in ours["graph"] if each[2]]
        # Whether a worker has left something out is asked once, whatever comes of the update.
        asks = name == "left out"
        if name == "sparse":
            exchanges_of_update = 4  # dense gradients, and of the others lengths, values, indices
        else:
            gradients = [each for each in updates if each[1] > 1]
            assert sorted(dtype for dtype, *_ in gradients) == ours["dtypes"]
            # The weight of the window goes along.
            assert sum(elements for _, elements, _ in gradients) == ours["trained"] + 1
            assert (len(updates) > len(gradients)) == asks
            exchanges_of_update = len(gradients)
        window = [len(between)] * exchanges.STEPS
        window[-1] += exchanges_of_update + asks
        assert ours["ran"] == window * exchanges.WINDOWS
        if plain is not None:
            assert plain["ran"] == [len(between) + exchanges_of_update] * len(ours["ran"])
            assert all(each in plain["graph"] for each in between)


# ---- files ---------------------------------------------------------------------------------------

KINDS = ["checkpoint", "keras"]


def files_of(quick, names):
    """Models and kinds of files, of which some are quick; of two workers, and one of three."""
    kinds = itertools.product(names, KINDS, [2])
    return [
        pytest.param(*each, marks=[] if each[:2] in quick else [pytest.mark.long])
        for each in [*kinds, ("sparse", "checkpoint", 3)]
    ]


def assert_ended(name, results, plain, start):
    """Workers have ended the windows of a model of `files` as the plain model has."""
    for result in results:
        result.pop("skipped", None)  # each worker knows its own
    assert_same_bits(results)
    assert results[0]["iterations"] == files.WINDOWS
    assert_ended_alone(name, Trained(results[0]), plain, start)


def assert_ended_alone(name, model, plain, start):
    """One process has."""
    if name == "pooled":
        assert_same_statistics(model, plain, start)
    else:
        assert_same_weights(model, plain, start, 1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "kind", "size"), files_of({("dense", "keras")}, list(files.MODELS))
)
def test_one_process_goes_on_from_the_file_of_workers(make_team, tmp_path, name, kind, size):
    """The window that the workers have begun is ended by one process; and by themselves."""
    law, team = files.MODELS[name], make_team(size)
    results = team.do("files.save", name=name, kind=kind, folder=str(tmp_path))
    model = files.read(files.path_of(tmp_path, kind), kind, law)
    pending = [result.pop("saved") for result in results]
    assert model.pending_micro_batches == pending[0] > 0
    files.train_alone(model, files.batches_of(law, team.size)[files.DONE :])
    plain, start = laws.plain(law, team.size)
    assert_ended(name, results, plain, start)
    assert_ended_alone(name, model, plain, start)


@pytest.mark.usefixtures("float64")
@pytest.mark.long
def test_hdf5_of_workers_between_windows(make_team, tmp_path):
    """It holds no window; between two there is none."""
    team = make_team(TWO)
    law, done = files.MODELS["dense"], files.STEPS
    results = team.do("files.save", name="dense", kind="h5", folder=str(tmp_path), done=done)
    model = files.read(files.path_of(tmp_path, "h5"), "h5", law)
    files.train_alone(model, files.batches_of(law, team.size)[done:])
    plain, start = laws.plain(law, team.size)
    assert_ended("dense", results, plain, start)
    assert_ended_alone("dense", model, plain, start)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "kind", "size"),
    files_of(
        {("dense", "checkpoint")},
        [name for name in files.MODELS if name != "left out"],  # one process has one part only
    ),
)
def test_workers_go_on_from_the_file_of_one_process(make_team, tmp_path, name, kind, size):
    """The window that one process has begun is ended by the workers."""
    law, team = files.MODELS[name], make_team(size)
    model = files.made(law)
    files.train_alone(model, files.batches_of(law, team.size)[: files.DONE])
    files.write(model, files.path_of(tmp_path, kind), kind)
    results = team.do("files.go_on", name=name, kind=kind, folder=str(tmp_path))
    assert results[0]["loaded"] == model.pending_micro_batches > 0
    plain, start = laws.plain(law, team.size)
    assert_ended(name, results, plain, start)


# ---- killed --------------------------------------------------------------------------------------


def killed_and_undisturbed(folder, size, moments, index, save_freq, after=0.0):
    """The results of workers of whom one was killed so often, and of some that were left alone.

    A cluster manager does what is done here: where one worker has gone, it ends the others, and
    starts all anew.
    """
    folder.mkdir(exist_ok=True)
    for number, moment in enumerate(moments):
        ended = pytest.raises(WorkerError, match=f"worker {index} ended with -9")
        with Team(size, folder / f"team {number}") as team, ended:
            team.do(
                "crashes.train",
                folder=str(folder / "backup"),
                save_freq=save_freq,
                index=index,
                dies_at=moment,
                after=after,
            )
    with Team(size, folder / "last team") as team:
        undisturbed = team.do("crashes.train")
        ours = team.do("crashes.train", folder=str(folder / "backup"), save_freq=save_freq)
    return ours, undisturbed


def assert_ends_as_undisturbed(ours, undisturbed):
    """Only the batches that were not trained on before have been trained on since."""
    assert_same_bits(ours)
    assert_same_bits(undisturbed)
    assert undisturbed[0]["trained"] == crashes.BATCHES * crashes.EPOCHS
    assert 0 < ours[0]["trained"] < undisturbed[0]["trained"]
    assert ours[0]["iterations"] == undisturbed[0]["iterations"] == crashes.UPDATES
    for ours_, other in zip(ours[0]["weights"], undisturbed[0]["weights"]):
        np.testing.assert_allclose(ours_, other, rtol=1e-9, atol=1e-12)


def test_a_worker_is_killed(tmp_path):
    """In the midst of an epoch and of a window; what started anew ends as what was left alone."""
    ours, undisturbed = killed_and_undisturbed(tmp_path, TWO, [12], index=1, save_freq=1)
    assert_ends_as_undisturbed(ours, undisturbed)
    assert ours[0]["trained"] == undisturbed[0]["trained"] - 11


@pytest.mark.long
def test_workers_are_killed_again_and_again(tmp_path):
    """The first of them, which writes the backups."""
    moments = [5, 8, 11, 15]
    ours, undisturbed = killed_and_undisturbed(tmp_path, 3, moments, index=0, save_freq=2)
    assert_ends_as_undisturbed(ours, undisturbed)


@pytest.mark.long
def test_a_worker_is_killed_at_any_moment(tmp_path):
    """While it computes, waits for the other, or writes a backup."""
    after = random.Random(0).uniform(0.01, 0.2)
    ours, undisturbed = killed_and_undisturbed(tmp_path, TWO, [4, 7, 10], 0, 1, after)
    assert_ends_as_undisturbed(ours, undisturbed)


# ---- one worker alone ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["pending_micro_batches", "skipped_windows"])
def test_one_worker_reads_alone(make_team, name):
    """Callbacks and logs of the first worker need not wait for the others."""
    assert make_team(TWO).do("faults.read", name=name) == [0, None]


# ---- how it is tested ----------------------------------------------------------------------------


@pytest.mark.long
def test_a_team_ends_with_its_test(tmp_path, monkeypatch):
    """Whatever fails: no process is left, and the failure shows what the worker has printed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [[taken.getsockname()[1]], free_ports(1)]
        monkeypatch.setattr("workers.harness.free_ports", lambda count: ports.pop(0))
        team = Team(1, tmp_path).start()
    assert not ports
    with pytest.raises(WorkerError, match=r"0 took more than 1 s(.|\n)*it sleeps"):
        team.do("faults.sleep", seconds=1)
    assert not team.is_running
    monkeypatch.undo()
    with Team(1, tmp_path / "other") as team:
        processes = list(team._processes)
        with pytest.raises(WorkerError, match=r"0 ended with 1(.|\n)*RuntimeError: as was to be"):
            team.do("faults.fail")
    assert all(process.returncode is not None for process in processes)
