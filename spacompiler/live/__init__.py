"""Pruning inside a training loop: the live module shrinks, and so does its optimiser's state.

    pruner = spacompiler.Pruner(model, example_inputs, optimizer, target="params=50%",
                                schedule="cubic(steps=1000)")
    for x, y in loader:
        loss(model(x), y).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruner.finish()
"""
