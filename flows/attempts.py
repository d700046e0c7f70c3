"""Attempts: which process makes a run as which of Prefect's flow runs. A process that is killed cannot tell Prefect its end.

So each start of a run writes `runs/<run>/attempts/<flow run>.json`, and looks at those that are there: where the process is
certainly dead and Prefect still takes its flow run for running, it is put right. Only who sits on the same machine can be
certain; for all others Prefect's automation waits for heartbeats (deployments/automations.yaml).

Nothing here ever fails a run: neither a store nor a Prefect server that does not answer.
"""

import atexit
import json
import logging
import os
import socket
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flows import ephemeral
from tasks.store import Store, alive, layout

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

log = logging.getLogger(__name__)

_begun: dict[str, list[tuple[Store, str]]] = {}  # flow run → the records of this process that its end makes superfluous


@dataclass(frozen=True)
class Attempt:
    """What an attempt's record says."""

    flow_run: str  # Prefect's id
    count: int  # Prefect's run_count: how often the flow run was set running, this time included
    owner: str  # by whom `alive` knows the process
    host: str
    pid: int
    started: str  # UTC

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


def begin(store: str, run: str) -> None:
    """Record that this process makes the run, and put right what Prefect believes of attempts that were killed.

    Call it inside the flow, as soon as the run's id is known.
    """
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    try:
        ephemeral.stop_with_us()
        place, key = Store(store), layout.attempt(run, flow_run.id)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with get_client(sync_client=True) as client:
            # `runtime` tells the count of before it was running
            count = client.read_flow_run(uuid.UUID(flow_run.id)).run_count
            mine = Attempt(flow_run.id, count, _owner(os.getpid()), socket.gethostname(), os.getpid(), now)
            place.write(key, json.dumps(asdict(mine), indent=1).encode())
            _begun.setdefault(mine.flow_run, []).append((place, key))
            for earlier in place.list(layout.attempts(run)):
                if earlier != key:
                    _look_at(client, place, earlier, f"run {run} goes on as flow run {flow_run.name} ({flow_run.id})")
    except Exception as error:
        log.warning("the attempts of run %s could not be looked after: %s", run, error)


def ended(flow: Any, flow_run: Any, state: Any) -> None:
    """Prefect knows how the flow run ended, so its record may go: a hook for on_completion and on_failure.

    There is none for crashes and cancellations, which may come from outside at any moment: the next attempt clears up after them.
    """
    for store, key in _begun.pop(str(flow_run.id), []):
        try:
            store.delete(key)
        except Exception as error:
            log.warning("%s could not be deleted: %s", store.uri(key), error)


def _look_at(client: "SyncPrefectClient", store: Store, key: str, goes_on: str) -> None:
    """Put an earlier attempt right where that is due; one whose end Prefect knows is forgotten."""
    try:
        attempt = Attempt(**store.read_json(key))
        if _is_over(client, attempt, f"its process ({attempt}) is gone; {goes_on}"):
            store.delete(key)
    except Exception as error:  # another server's flow run, a record of another version, deleted by another attempt
        log.info("%s is left as it is: %s", store.uri(key), error)


def _is_over(client: "SyncPrefectClient", attempt: Attempt, message: str) -> bool:
    """Whether the attempt's flow run has ended on this server; one whose process is certainly dead is ended now.

    Raises ObjectNotFound: this server does not know the flow run.
    """
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter, TaskRunFilterState
    from prefect.client.schemas.filters import TaskRunFilterStateType as States
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled, Crashed

    flow_run = client.read_flow_run(uuid.UUID(attempt.flow_run))
    state = flow_run.state
    if state and state.is_final():
        return True
    # a retry that waits, or was handed to another process, is no concern of the dead one
    its_own = state and (state.is_running() or state.is_cancelling()) and flow_run.run_count == attempt.count
    if not its_own or not alive.certainly_dead(attempt.owner):
        return False
    # not forced: where someone else has ended it by now, that holds
    ended = Cancelled if state and state.is_cancelling() else Crashed
    client.set_flow_run_state(flow_run.id, ended(message=message))
    unfinished = TaskRunFilter(
        state=TaskRunFilterState(type=States(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]))
    )
    of_it = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    for task_run in client.read_task_runs(flow_run_filter=of_it, task_run_filter=unfinished):
        client.set_task_run_state(task_run.id, ended(message=message), force=True)
    log.warning("flow run %s (%s) is set %s: %s", flow_run.name, flow_run.id, ended.__name__, message)
    return True


@lru_cache
def _owner(pid: int) -> str:
    """By what `alive` knows this process, shown until it ends. `pid`: a fork is another process."""
    owner = uuid.uuid4().hex
    atexit.register(alive.end, owner, alive.show(owner))
    return owner
