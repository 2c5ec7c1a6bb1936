"""The verl engine: verl 0.9's own trainers with the credit and the loss of any `Method`.

    pip install 'tokencredit[verl]'
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=tokencredit_sync +trainer.v1.tokencredit.method=gtpo ...

carrier.py        what `trainer.v1.tokencredit` of verl's configuration holds
carried.py        how verl carries a method: a policy loss of its registry, or a loss function of its own
configuration.py  what the method derives in verl's configuration, and what it refuses there
batch.py          verl's batch as `Rollouts`; credit and plan of it
losses.py         the policy losses, and the loss function that knows the plan
trainers.py       verl's three trainers, with that credit
plugin.py         the entry point: registers losses and trainers when verl imports the modules they belong to
doctor.py         `tokencredit doctor verl`

Nothing here is imported with tokencredit, and verl is imported by losses, trainers and doctor alone.
"""

PREFIX = "tokencredit_"
"""How the names of ours begin in verl's registries."""
CHANNEL = PREFIX + "channel"
