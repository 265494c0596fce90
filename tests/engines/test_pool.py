"""Why: a call to a server in the wrong state samples from half-loaded weights, or waits for one that is gone; a loss
that is told twice restarts a healthy server, and one that does not count lets it restart for ever.

Random orders of everything that happens to servers, against a model of what each holds. The processes are made up:
real ones are killed and hung in tests/rollout/test_servers.py and tests/end_to_end.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.pool import MAX_BAD_ANSWERS, EnginePool
from megatron_fipo.engines.states import IN_SERVICE, TRANSITIONS, Server, State
from megatron_fipo.errors import RolloutError

MAX_RESTARTS = 2
OWN = "the model directory's"


class MadeUpProcess:
    """A process that ends when it is told to."""

    def __init__(self) -> None:
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


class MadeUpLog:
    def excerpt(self) -> str:
        return "its log"


class MadeUpStarter:
    """Starts processes that are none, and counts."""

    token = "token"

    def __init__(self) -> None:
        self.started: Counter[str] = Counter()

    def end(self, server: Server) -> str:
        assert server.state is State.LOST
        return f"{server.url}: {server.reason}"

    def start_again(self, server: Server) -> None:
        server.process = MadeUpProcess()  # type: ignore[assignment]
        self.started[server.url] += 1


class Pool(RuleBasedStateMachine):
    """A pool of two servers of ours or of two elsewhere, and what each of them holds."""

    @initialize(ours=st.booleans())
    def begin(self, ours: bool) -> None:
        self.warnings: list[str] = []
        self.starter = MadeUpStarter()
        os.environ[TOKEN_VARIABLE] = "token"
        config = RolloutConfig(addresses=["http://a", "http://b"], max_restarts=MAX_RESTARTS)
        self.pool = EnginePool(config, Path(), Path(), seed=0, warn=self.warnings.append)
        self.ours = ours
        if ours:
            self.pool._starter = self.starter  # type: ignore[assignment]
        for server in self.pool.servers:
            if ours:
                server.process, server.log = MadeUpProcess(), MadeUpLog()  # type: ignore[assignment]
            server.enter(State.SERVING)
        self.holds: dict[str, object] = {server.url: OWN for server in self.pool.servers}
        self.lives_lost: set[tuple[str, int]] = set()
        self.in_a_row: Counter[str] = Counter()
        self.updating: list[Server] = []
        self.has_updated = False

    def _lost(self, server: Server) -> None:
        self.lives_lost.add((server.url, server.life - 1))
        self.in_a_row[server.url] += 1
        self.holds[server.url] = None

    @rule(index=st.integers(0, 1), late=st.booleans(), for_good=st.booleans())
    def a_request_fails(self, index: int, late: bool, for_good: bool) -> None:
        server = self.pool.servers[index]
        before = server.state
        told = self.pool.lose(server, "broken", life=server.life - late, for_good=for_good)
        assert told == (before in IN_SERVICE and not late)
        assert server.state is (State.LOST if told else before)
        if told:
            self._lost(server)
            if for_good and not self.ours:
                self.in_a_row[server.url] = MAX_RESTARTS + 1

    @rule(index=st.integers(0, 1), late=st.booleans(), good=st.booleans())
    def an_answer_comes(self, index: int, late: bool, good: bool) -> None:
        server = self.pool.servers[index]
        bad, before = server.bad_answers, server.state
        if good:
            self.pool.answered(server)
            assert server.bad_answers == 0
        elif self.pool.answered_wrongly(server, server.life - late, "nonsense"):
            assert not late and bad + 1 >= MAX_BAD_ANSWERS and before in IN_SERVICE and server.state is State.LOST
            self._lost(server)
            if not self.ours:
                self.in_a_row[server.url] = MAX_RESTARTS + 1

    @precondition(lambda self: self.ours)
    @rule(index=st.integers(0, 1))
    def a_process_ends(self, index: int) -> None:
        """Which the pool finds out when it looks."""
        process = self.pool.servers[index].process
        assert process is not None
        process.returncode = -9

    @rule()
    def repair(self) -> None:
        again = [s for s in self.pool.returning if s.process is not None and s.process.poll() is not None]
        lost = [server for server in self.pool.servers if server.state is State.LOST]
        lives, before = {server: server.life for server in self.pool.servers}, len(self.warnings)
        counts = {server: self.in_a_row[server.url] + (server in again) for server in self.pool.servers}
        try:
            assert self.pool.repair() == bool(lost or again)
            gave_up = False
        except RolloutError:
            gave_up = True
        for server in again:
            assert server.life == lives[server] + 1
            self._lost(server)
        assert gave_up == (self.ours and any(server.state is State.GIVEN_UP for server in self.pool.servers))
        done = {*lost, *again}
        told = [server for server in done if not self.ours or server.state is State.RESTARTING]
        assert len(self.warnings) - before == len(told), "each lost server is warned of once, or ends the run"
        for server in done:
            may_return = counts[server] <= MAX_RESTARTS
            assert server.state is ((State.RESTARTING if self.ours else State.AWAY) if may_return else State.GIVEN_UP)

    @precondition(lambda self: self.pool.returning)
    @rule(as_another=st.booleans())
    def one_answers_again(self, as_another: bool) -> None:
        server = self.pool.returning[0]
        if as_another:
            self.pool.give_up(server, "it is another")
            assert server.state is State.GIVEN_UP
        else:
            self.pool.is_back(server)
            self.holds[server.url] = OWN
            assert (server.state is State.SERVING) == (not self.has_updated)

    @rule(index=st.integers(0, 1))
    def one_is_lost_and_soon_back(self, index: int) -> None:
        """Which takes the other rules too long to come upon while an update is under way."""
        self.a_request_fails(index, late=False, for_good=False)
        self.repair()
        if self.pool.returning:
            self.one_answers_again(as_another=False)

    @rule()
    def begin_update(self) -> None:
        self.has_updated = True
        self.pool.begin_update()
        self.updating = self.pool.in_service
        assert self.pool.serving == []
        for server in self.updating:
            self.holds[server.url] = "half of new ones"

    @precondition(lambda self: self.updating)
    @rule()
    def finish_update(self) -> None:
        """Those that are there from its beginning to its end have the new weights; who came back meanwhile has not."""
        whole = [server for server in self.updating if self.holds[server.url] == "half of new ones"]
        version = (self.pool.weight_version or 0) + 1
        self.pool.note_version(version)
        for server in whole:
            self.holds[server.url] = version
        self.pool.end_update()
        assert self.pool.serving == whole
        self.updating = []

    @rule()
    def end_step(self) -> None:
        row = self.pool.end_step()
        assert row["rollout_servers"] == len(self.pool.in_service)
        for server in self.pool.in_service:
            self.in_a_row[server.url] = 0

    @invariant()
    def only_whole_weights_are_sampled_from(self) -> None:
        if hasattr(self, "pool"):
            wanted = OWN if self.pool.weight_version is None else self.pool.weight_version
            assert all(self.holds[server.url] == wanted for server in self.pool.serving)

    @invariant()
    def restarts_are_bounded(self) -> None:
        if hasattr(self, "pool"):
            for server in self.pool.servers:
                assert server.losses == self.in_a_row[server.url]
                assert server.state is not State.RESTARTING or server.losses <= MAX_RESTARTS

    @invariant()
    def what_is_given_up_stays_out(self) -> None:
        if hasattr(self, "pool"):
            assert not {State.LOST, State.GIVEN_UP} & {server.state for server in self.pool.in_service}


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase


def test_no_state_is_a_dead_end_but_one() -> None:
    assert [state for state, following in TRANSITIONS.items() if not following] == [State.GIVEN_UP]
    assert TRANSITIONS.keys() == set(State)


def test_a_state_that_may_not_follow_is_refused() -> None:
    """The control of the machine above: the pool could not get there by mistake."""
    server = Server("http://a", state=State.LOST)
    with pytest.raises(AssertionError, match="cannot follow"):
        server.enter(State.SERVING)
