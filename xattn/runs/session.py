"""The training of a pack: runs that differ only in numbers and train as one program. Most often it is a single run.

:func:`train_pack` reads from top to bottom. Each run keeps its own folder, rows, checkpoints and end; the corpus, the
programs and the pace are shared. A resumed pack has the same members in the same places. Members that have ended keep
their places, but no longer change. So the program is the same, and so are the bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

from xattn.runs.ending import conclude
from xattn.runs.opening import begin, describe, open_desk, read_inputs
from xattn.runs.record import Run
from xattn.runs.resuming import newest_of_all, resumed, rolls_back, spectator
from xattn.system import hosts
from xattn.system.device import keep_compiled_programs
from xattn.training.attention_choice import choose_attention
from xattn.training.loop import train
from xattn.training.memory import refuse_what_does_not_fit
from xattn.training.programs import hyperparameters, programs
from xattn.training.sharding import layout_of


def train_pack(runs: Sequence[Run], stop: Callable[[], bool]) -> None:
    """Train the runs that have not finished as one program, each until its end or until ``stop()``.

    The runs share program, data and pace. ``stop`` is called at each step. Raise :class:`XattnError` for what a user
    can fix.
    """
    team = hosts.team()
    at_work = [run for run in runs if not run.is_finished]
    config = at_work[0].config
    keep_compiled_programs()

    # Everything that can be refused is refused before any folder changes.
    with team.in_step():
        layout = layout_of(config)
        choices = choose_attention(config, context=layout.sizes["context"], devices=math.prod(layout.sizes.values()))
        inputs = {run: read_inputs(run, layout, stop) for run in runs}
    data = inputs[at_work[0]].data  # the members' data differ only in their batches
    team.the_same({"data_sha256": data.sha256})
    with team.in_step():
        pack = [run.folder.path.name for run in runs] if len(runs) > 1 else None
        origins = {run: begin(run, inputs[run].data, layout, choices, pack) for run in at_work}

    with contextlib.ExitStack() as resources:
        desks = [resources.enter_context(open_desk(run, inputs[run], origins[run], layout)) for run in at_work]

        # One program serves all members. It has to fit in memory.
        compiled, is_new = programs(config, data.tokenizer.vocab_size, optional=data.optional, size=len(runs))
        refuse_what_does_not_fit(compiled.peak_memory_bytes, config)

        # All members start at one step: that of the newest checkpoint that each of them has.
        fresh = {run: compiled.init(hyperparameters(run.config)) for run in runs}
        starts = newest_of_all(desks, fresh)
        trainees = {desk.run: resumed(desk, starts[desk], fresh[desk.run]) for desk in desks}
        members = [trainees[run].member if run in trainees else spectator(inputs[run].data, fresh[run]) for run in runs]
        for run, trainee in trainees.items():
            seconds = compiled.compile_seconds if is_new and run is at_work[0] else None
            describe(trainee.desk, compiled, trainee.member.progress.state, compile_seconds=seconds)

        # train() returns whenever a member ends; the others then continue.
        bytes_per_token, stops = data.bytes_per_token(), team.agreed(stop)
        while any(member.active for member in members):
            training = [trainee for trainee in trainees.values() if trainee.member.active]
            train(compiled, members, data.held_out, config.trainer, bytes_per_token=bytes_per_token, stop=stops)
            for trainee in training:
                if not trainee.member.active and not rolls_back(trainee, compiled):
                    trainee.desk.checkpoints.wait()
                    trainee.metrics.close()
                    conclude(trainee.desk.run, trainee.desk.inputs.data, compiled, trainee.member.progress)
