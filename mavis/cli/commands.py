"""The commands of `mavis`, with what each does."""

COMMANDS = {
    "demo": "train, evaluate and use a critic on the embedded policy; takes minutes, downloads nothing",
    "train": "train a critic for a policy",
    "search": "search the settings of training for the best critic",
    "distill": "distill several critics into one",
    "evaluate": "sweep weights and β, and compare with the optimal reward at each KL",
    "generate": "continue prompts under preference weights",
    "chat": "talk to a chat model under preference weights that you change as you go",
    "elicit": "infer a user's preference weights from choices between two responses",
    "align": "fine-tune a copy of a policy for an objective under a KL penalty",
    "train-reward": "train a reward model from preference pairs",
    "info": "say what a critic is for, how it was trained, and what its budgets cost",
    "report": "gather the runs of a sweep into one table and one plot",
}
