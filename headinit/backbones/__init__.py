"""Named pretrained models: what a name stands for, where its weights come from, how they are loaded."""
