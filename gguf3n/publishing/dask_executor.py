"""Runs the steps of jobs on a Dask cluster; the only module that knows Dask, which comes with gguf3n[dask].

Where a cluster is, and how its workers are started, is Dask's affair: SSH, Slurm, Kubernetes. Its workers share the
jobs' directory. A step is submitted when its needs are, Dask runs it when they are done, and runs it again elsewhere
where its worker is lost. Uploads are one step for each repository, so no two workers write to one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from gguf3n.errors import Gguf3nError, UsageError
from gguf3n.publishing.jobs import Done, Jobs, do, steps_of

RETRIES = 3
"""Of a step whose worker is lost."""


def run_on_dask(
    jobs: Jobs,
    address: str | None = None,
    *,
    workers: int | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> list[Done]:
    """All steps on a cluster.

    Args:
        address: of the scheduler, as in "tcp://host:8786"; by default a cluster of processes on this machine.
        workers: how many of those; by default one a processor.
        told: called with the name of each step that is done.

    Raises: UsageError where Dask is not installed or does not answer; the error of a step.
    """
    if importlib.util.find_spec("distributed") is None:
        raise UsageError("--executor dask: Dask is not installed", fix="pip install 'gguf3n[dask]'")
    from distributed import Client, LocalCluster

    cluster: Any = None
    if address is None:
        cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
    try:
        with _client(Client, address, cluster) as client:
            return run_on_client(jobs, client, told)
    finally:
        if cluster is not None:
            cluster.close()


def _client(kind: Any, address: str | None, cluster: Any) -> Any:
    try:
        return kind(cluster if address is None else address, timeout="20s")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--executor dask:{address}: no scheduler answers",
            expected="the address of a Dask scheduler, as in dask:tcp://127.0.0.1:8786",
            found=str(error),
        ) from error


def run_on_client(jobs: Jobs, client: Any, told: Callable[[str], None] = lambda text: None) -> list[Done]:
    """The same with a client that is there. Raises: the error of a step; Gguf3nError: no worker is left for one."""
    from distributed import as_completed

    futures: dict[str, Any] = {}
    for step in steps_of(jobs, spread=True):
        needs = [futures[name] for name in step.needs]
        futures[step.id] = client.submit(_do, jobs, step, *needs, key=step.id, retries=RETRIES, pure=False)
    done: dict[str, Done] = {}
    try:
        for future in as_completed(futures.values()):
            done[future.key] = _result(future).check()
            told(future.key)
    except BaseException:
        client.cancel(list(futures.values()))
        raise
    return [done[name] for name in futures]


def _do(jobs: Jobs, step: Any, *needs: Done) -> Done:
    """A step, unless one that it needs has failed, whose error is then its own."""
    failed = next((need for need in needs if need.error is not None), None)
    return failed if failed is not None else do(jobs, step)


def _result(future: Any) -> Done:
    try:
        found: Done = future.result()
        return found
    except Exception as error:
        raise Gguf3nError(
            f"{future.key}: could not be run",
            found=f"{type(error).__name__}: {error}",
            fix="look at the workers' logs; run the same command again, and it goes on",
        ) from error
