"""A run is judged by what was measured."""

from __future__ import annotations

from report import MIB, MOST, TYPICAL, Life, Sample


def life(**more: list[float]) -> Life:
    """Return ten minutes of two guests in which nothing grew and 20 workers were killed."""
    flat = [100.0] * 120
    master, files = more.get("master", flat), more.get("files", flat)
    samples = [
        Sample(
            at=5.0 * n,
            master=[int(master[n] * MIB), 10 * MIB, 50],
            workers=[100 * MIB, 10 * MIB, int(files[n])],
            counted=2,
            connected=2,
        )
        for n in range(120)
    ]
    times = more.get("times", [0.05] * 20)
    return Life(600, 2, 0, [(10.0, took, "split") for took in times], samples=samples)


def test_nothing_is_wrong_with_what_does_not_grow() -> None:
    wobbling = [100.0 + n % 7 for n in range(120)]
    assert life().judge() == []
    assert life(master=wobbling, files=wobbling).judge() == []


def test_what_grows_in_the_second_half_is_named() -> None:
    growing = [100.0 + n / 4 for n in range(120)]
    (wrong,) = life(master=growing).judge()
    assert wrong.startswith("master, RSS grew by")
    (wrong,) = life(files=growing).judge()
    assert wrong.startswith("all workers, descriptors grew by")


def test_what_grew_in_the_first_half_only_is_a_beginning() -> None:
    assert life(master=[min(100.0, 40.0 + n) for n in range(120)]).judge() == []


def test_successors_that_come_late_are_named() -> None:
    (wrong,) = life(times=[1.5 * TYPICAL] * 20).judge()
    assert wrong.startswith(f"50 % of killed workers' successors take up to {1.5 * TYPICAL:.3f} s")
    (wrong,) = life(times=[0.05] * 90 + [3 * MOST] * 3).judge()
    assert wrong.startswith(f"99 % of killed workers' successors take up to {3 * MOST:.3f} s")


def test_a_run_without_kills_shows_nothing() -> None:
    assert life(times=[]).judge() == ["only 0 workers were killed"]
