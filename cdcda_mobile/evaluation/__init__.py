"""How good a personal model is, and whether it is so by chance.

``metrics`` score answers by LaMP's rules, ``answers`` asks a loaded model, ``baselines`` are the rivals without training, ``statistics``
compares users in pairs, ``report`` puts the cells of an experiment into tables and a plot, ``predictions`` writes LaMP's files,
``canary`` asks what a model would tell of secrets it was trained on.
"""
