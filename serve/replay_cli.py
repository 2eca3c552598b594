"""`hone replay ...`: what is in the buffer of a run, what became of a group, why a step moved.

Invariant: looking changes nothing. The buffer of a run that trains is asked where it is; that of a
run which has ended is opened from its directory for as long as the command takes.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.group_log import GroupLine
    from cluster.replay_reader import BufferReader
    from cluster.run_dir import RunDir

app = typer.Typer(
    help="Look into the replay buffer and the ledger of a run; nothing is changed.",
    no_args_is_help=True,
)
Run = Annotated[str, typer.Argument(metavar="RUN", help="A name under runs/ or a path.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def stats(run: Run, as_json: AsJson = False) -> None:
    """Count the groups by fate and check that ledger, buffer and checkpoints agree."""
    import msgspec

    from cluster.reconcile import reconcile
    from cluster.run_dir import RunDir

    run_dir = RunDir.open(run)
    with _buffer(run_dir) as buffer:
        counts, result = buffer.stats(), reconcile(run_dir, buffer)
    if as_json:
        print(json.dumps(msgspec.to_builtins({"buffer": counts, "groups": result}), indent=1))
        return
    print(f"buffer   ready {counts.ready}, leased {counts.leased}, consumed and not yet durable "
          f"{counts.consumed}; {counts.payload_bytes / 1e6:.1f} MB")  # fmt: skip
    print(f"groups   sampled {result.num_sampled}, used {result.num_used}, "
          f"waiting {result.num_waiting}")  # fmt: skip
    for reason, count in sorted(result.dropped.items()):
        print(f"dropped  {count} {reason}")
    print(f"ledger   step {result.steps}, policy version {result.policy_version}")
    for fault in result.faults:
        print(f"FAULT    {fault}")
    print("sound    every group was used once, dropped with a reason, or waits"
          if result.is_sound else "a run that stands still must have no FAULT line")  # fmt: skip


@app.command()
def show(
    run: Run,
    group: Annotated[
        str | None, typer.Argument(metavar="[GROUP]", help="A group id; without one, all places.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Most lines to print.")] = 20,
) -> None:
    """List what the buffer holds and its dead letters, or tell the story of one group."""
    from cluster.run_dir import RunDir

    run_dir = RunDir.open(run)
    with _buffer(run_dir) as buffer:
        if group is not None:
            _print_story(run_dir, buffer, group)
            return
        for group_id, place in sorted(buffer.places().items())[:limit]:
            print(f"{place:<9} {group_id}")
        for letter in buffer.dead_letters(limit):
            print(f"dead      {letter.group_id}  {letter.reason}")


@app.command()
def why(
    run: Run,
    step: Annotated[int, typer.Option(help="The optimizer step to explain.")],
    as_json: AsJson = False,
) -> None:
    """List the groups, versions, verdicts and arms that moved a step."""
    import msgspec

    from cluster.group_log import GroupLog
    from cluster.ledger import Ledger
    from cluster.run_dir import RunDir

    run_dir = RunDir.open(run)
    records = {record.step: record for record in Ledger(run_dir.ledger).records()}
    if step not in records:
        known = f"1 to {max(records)}" if records else "none yet"
        raise ConfigError(f"--step {step}: not in the ledger of {run_dir.name} (steps {known})")
    record = records[step]
    known_lines = {line.group_id: line for line in GroupLog(run_dir).read() if line.rewards}
    lines = [known_lines[g] for g in (*record.group_ids, *record.skipped) if g in known_lines]
    if as_json:
        print(json.dumps(msgspec.to_builtins({"step": record, "groups": lines}), indent=1))
        return
    if record.skipped:
        print(f"step {step} was skipped (its gradient was not finite); dropped: "
              f"{', '.join(record.skipped)}")  # fmt: skip
        return
    versions = "; ".join(f"{name} {', '.join(v)}" for name, v in record.reward_versions.items())
    print(f"step {step} made policy version {record.policy_version} from {len(record.group_ids)} "
          f"groups, {record.num_loss_tokens} loss tokens")  # fmt: skip
    print(f"reward versions: {versions}")
    for group_id, version in zip(record.group_ids, record.policy_versions, strict=True):
        print(
            f"{group_id}  sampled by version {version} (age {record.policy_version - 1 - version})"
        )
        if group_id in known_lines:
            _print_verdicts(known_lines[group_id])


def _print_story(run_dir: "RunDir", buffer: "BufferReader", group_id: str) -> None:
    from cluster.group_log import GroupLog
    from cluster.ledger import Ledger

    lines = [line for line in GroupLog(run_dir).read() if line.group_id == group_id]
    place = buffer.places().get(group_id)
    steps = [r.step for r in Ledger(run_dir.ledger).records() if group_id in r.group_ids]
    if not lines and place is None and not steps:
        raise ConfigError(f"{group_id}: no such group in {run_dir.name}")
    for line in lines:
        print(f"{line.fate} {line.reason} {line.detail}".rstrip())
        if line.rewards:
            _print_verdicts(line)
    print(f"used by step {steps[0]}" if steps else f"in the buffer: {place or 'no'}")
    stored = buffer.find(group_id)
    for trajectory in stored.trajectories if stored else []:
        print(f"  {trajectory.reward}  {json.dumps(trajectory.text)[:160]}")


def _print_verdicts(line: "GroupLine") -> None:
    for name, scores in line.signals.items():
        shown = " ".join("abstained" if s is None else f"{s:g}" for s in scores)
        print(f"    {name} ({line.reward_versions.get(name, '?')}): {shown}")
    if any(arm != "plain" for arm in line.arms):
        print(f"    arms: {' '.join(line.arms)}")


@contextmanager
def _buffer(run_dir: "RunDir") -> "Generator[BufferReader]":
    """The buffer of a run, wherever its server is; one that has ended is started meanwhile."""
    from cluster import config_file
    from cluster.embedded_redis import EmbeddedRedis, url_in
    from cluster.redis_client import buffer_url, connect
    from cluster.replay_reader import BufferReader

    url = buffer_url(config_file.load(run_dir.config).buffer, address="local")
    if url is not None:
        yield BufferReader(connect(url), run_dir.buffer_id)
        return
    try:
        client = connect(url_in(run_dir.redis), retry_s=0.5)
    except ConfigError:
        if not run_dir.redis.is_dir():
            raise
        with EmbeddedRedis(run_dir.redis) as server:
            yield BufferReader(connect(server.url), run_dir.buffer_id)
        return
    yield BufferReader(client, run_dir.buffer_id)
