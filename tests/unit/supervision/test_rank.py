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
