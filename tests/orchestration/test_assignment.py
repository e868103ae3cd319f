"""Which rollout worker sends its requests to which engines."""

from dataclasses import dataclass, field

from nanoslime.orchestration.rollout_manager import Assignment


@dataclass
class Named:
    name: str


@dataclass
class Told:
    """What a worker was told last."""

    names: list[str] = field(default_factory=list)
    drained: bool = False

    def set_engines(self, engines) -> None:
        self.names = [engine.name for engine in engines]
        self.drained = False

    def drain(self) -> None:
        self.drained = True


def test_a_worker_has_the_engines_beside_it_and_those_of_others_when_none_is_left() -> None:
    workers = [Told(), Told()]
    a, b, c = (Named(name) for name in "abc")
    assignment = Assignment(workers, {"a": 0, "b": 0, "c": 1})
    assignment.set_engines([a, b, c])
    assert [worker.names for worker in workers] == [["a", "b"], ["c"]]
    assignment.drain()
    assert all(worker.drained for worker in workers)
    assignment.set_engines([a, b])
    assert [worker.names for worker in workers] == [["a", "b"], ["a", "b"]]
    assignment.set_engines([])
    assert [worker.names for worker in workers] == [[], []]
