"""The cost of a busy core: ratios by hand, and one real round of the shortest kind."""

from benchmark import measure_busy_cores
from benchmark.measure_busy_cores import REFERENCE, THREADS, measure, summarise


def test_the_ratio_is_taken_within_a_round():
    seconds = {REFERENCE: [1.0, 10.0, 2.0], "slow": [2.0, 30.0, 8.0]}
    assert summarise(seconds) == {REFERENCE: 1.0, "slow": 3.0}


def test_each_case_is_timed_with_its_own_environment(monkeypatch):
    """One real process, and the cases around it."""
    seen = []

    def time_in_a_process(settings, repeats):
        seen.append(settings)
        return 1.0

    real = measure_busy_cores.time_in_a_process(THREADS["1 thread"], 1)
    monkeypatch.setattr(measure_busy_cores, "time_in_a_process", time_in_a_process)
    seconds = measure(1, 2)
    assert 0 < real < 60
    assert seen == [settings for settings in THREADS.values() for _ in range(2)] * 2
    assert all(values == [1.0, 1.0] for values in seconds.values())
    assert len(seconds) == 2 * len(THREADS)
