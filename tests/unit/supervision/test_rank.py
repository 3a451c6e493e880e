"""What a rank does about each thing that its watches tell; how they notice is tested with them."""

from ds_dpo.config.load import load_config
from ds_dpo.process.departure import EXIT_STATUS_OF_LOST_PARENT
from ds_dpo.process.launchers import Process
from ds_dpo.supervision.rank import Supervision


def test_a_rank_whose_launcher_ended_leaves_unless_it_was_asked_to_save(tmp_path, monkeypatch):
    statuses = []
    monkeypatch.setattr("ds_dpo.supervision.rank.leave", lambda status, last_words: statuses.append(status))
    rank = Supervision(load_config(["--config", "miniature", f"--output_dir={tmp_path}"]).config, {})
    launcher = Process(pid=1, started=1, name="deepspeed")
    rank._leave_orphaned(launcher)
    assert statuses == [EXIT_STATUS_OF_LOST_PARENT]
    rank.stop.ask()
    rank._leave_orphaned(launcher)
    assert statuses == [EXIT_STATUS_OF_LOST_PARENT], "Ctrl-C reaches both, and the launcher is gone first"


def test_a_rank_that_leaves_at_once_notes_why_for_the_log(tmp_path, monkeypatch):
    notes, printed = [], []
    monkeypatch.setattr("ds_dpo.supervision.rank.leave", lambda status, last_words: last_words())
    monkeypatch.setattr("ds_dpo.supervision.rank.say", printed.append)
    monkeypatch.setattr("ds_dpo.supervision.rank.MOMENT_SECONDS", 0)
    rank = Supervision(load_config(["--config", "miniature", f"--output_dir={tmp_path}"]).config, {})
    rank.note = notes.append
    rank._leave_at_once(15)
    rank._leave_hanging("a step has taken more than 600 s")
    rank._leave_orphaned(Process(pid=1, started=1, name="deepspeed"))
    assert notes == [
        "rank 0 left: second SIGTERM: exiting at once, without saving; status 143",
        f"rank 0 left: a step has taken more than 600 s, which is a hang; stacks are in {tmp_path}/stacks; status 70",
        "rank 0 left: its launcher deepspeed (process 1) is gone; status 72",
    ]
    assert len(printed) == 3
