"""What Lightning 1.x gave a trainer beside its methods: argparse, loops as objects, older names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from flashtask.trainer.lightning1.loops import LoopTree, TreeLoop
from flashtask.trainer.lightning1.older_arguments import ArgparseMixin, todays_names
from flashtask.trainer.loop import Loops

if TYPE_CHECKING:
    from flashtask.trainer.trainer import Trainer

__all__ = ["NOT_THERE", "OLDER_HOOKS", "Lightning1Trainer"]

#: Hooks that only older trainers call -> what takes their place here.
OLDER_HOOKS = {
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_init_start": "setup",
    "on_init_end": "setup",
    "on_keyboard_interrupt": "on_exception",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
    "on_validation_model_eval": "on_validation_start",
}


#: Attributes of Lightning's trainers that this one does not have -> what docs/from-lightning.md says about them.
NOT_THERE = {
    "amp_backend": "trainer.precision_plugin",
    "call_hook": "internal to Lightning; trainer.current_run calls hooks",
    "convert_to_lightning_optimizers": "internal to Lightning; trainer.optimizers are those of torch",
    "data_parallel": "trainer.world_size",
    "data_parallel_device_ids": "trainer.device_ids",
    "default_attributes": "inspect.signature(Trainer)",
    "distributed_sampler_kwargs": "trainer.world_size and trainer.global_rank",
    "enable_validation": "bool(trainer.val_dataloaders)",
    "get_deprecated_arg_names": "internal to Lightning",
    "gpus": "trainer.device_ids",
    "init_module": 'torch.device("meta") as a context, or make layers in Module.configure_model',
    "init_optimizers": "internal to Lightning; trainer.optimizers has them",
    "ipus": "IPUs are not supported",
    "lightning_optimizers": "trainer.optimizers",
    "lr_schedulers": "trainer.lr_scheduler_configs",
    "match_env_arguments": "environment variables set no arguments",
    "num_gpus": "trainer.num_devices",
    "num_processes": "trainer.world_size",
    "optimizer_frequencies": 'a "frequency" beside each "optimizer" that Module.configure_optimizers returns',
    "parse_argparser": "Trainer.from_argparse_args(arguments)",
    "predicted_ckpt_path": "trainer.ckpt_path",
    "prediction_writer_callbacks": "trainer.callbacks",
    "prepare_dataloader": "internal to Lightning; DataModule.train_dataloader and the like make loaders",
    "progress_bar_dict": "trainer.progress_bar_metrics",
    "received_sigterm": "trainer.interrupted",
    "request_dataloader": "internal to Lightning; DataModule.train_dataloader and the like make loaders",
    "reset_predict_dataloader": "trainer.predict_dataloaders are those of the last prediction; each run makes its own",
    "reset_test_dataloader": "trainer.test_dataloaders are those of the last test; each run makes its own",
    "reset_train_dataloader": "Trainer(reload_dataloaders_every_n_epochs=1)",
    "reset_train_val_dataloaders": "Trainer(reload_dataloaders_every_n_epochs=1)",
    "reset_val_dataloader": "Trainer(reload_dataloaders_every_n_epochs=1)",
    "resume_from_checkpoint": "trainer.ckpt_path",
    "root_gpu": "trainer.device_ids[0]",
    "run_stage": "trainer.loops, which docs/loops.md describes",
    "should_rank_save_checkpoint": "trainer.is_global_zero",
    "slurm_job_id": 'os.environ["SLURM_JOB_ID"]',
    "terminate_on_nan": "a NaN always ends a run",
    "tested_ckpt_path": "trainer.ckpt_path",
    "tpu_cores": "TPUs are not supported",
    "training_type_plugin": "trainer.strategy",
    "tuning": "no flag; trainer.tune(model) runs fits of its own",
    "use_amp": "trainer.precision_plugin",
    "validated_ckpt_path": "trainer.ckpt_path",
    "verbose_evaluate": "trainer.test(model, verbose=False)",
    "weights_save_path": "trainer.checkpoint_callback.dirpath",
    "weights_summary": "Trainer(callbacks=[ModelSummary(max_depth=1)])",
}


class Lightning1Trainer(ArgparseMixin):
    """Base of `Trainer` for scripts that were written for Lightning 1.x: what connects the engine with this folder."""

    loops: Loops
    module: Any
    _loop_tree: LoopTree | None = None

    #: hooks that this trainer does not call -> what to write instead
    older_hooks: Mapping[str, str] = OLDER_HOOKS

    if not TYPE_CHECKING:  # a checker is to find mistyped attributes

        def __getattr__(self, name: str) -> Any:
            if name in NOT_THERE:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {NOT_THERE[name]}")
            return object.__getattribute__(self, name)  # whose error names what a property could not find

    @property
    def lightning_module(self) -> Any:
        """The same as `module`."""
        return self.module

    @classmethod
    def _todays_names(cls, older: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        return todays_names(cls, older, given)

    # ---- loops as objects, made when they are first asked for

    fit_loop, validate_loop = TreeLoop(), TreeLoop()
    test_loop, predict_loop = TreeLoop(), TreeLoop()

    @property
    def loop_tree(self) -> LoopTree:
        """The loops that go through a run in place of `loops`, once one of them is changed."""
        if self._loop_tree is None:
            self._loop_tree = LoopTree(cast("Trainer", self))
        return self._loop_tree

    @property
    def has_own_loops(self) -> bool:
        """Whether something other than the functions of loop.py goes through a run."""
        return self._path is not self.loops or type(self.loops) is not Loops or bool(vars(self.loops))

    @property
    def _path(self) -> Loops | LoopTree:
        """What goes through a run: `loops`, unless a loop object was replaced."""
        tree = self._loop_tree
        return tree if tree is not None and tree.is_changed else self.loops
