"""Divergences as a user would write them, right and wrong."""

import torch


def squares(t, s):
    return (t - s) ** 2


def squares_by_hand(t, s):
    return (t - s).detach() ** 2


def squares_by_hand_derivative(t, s):
    return 2 * (s - t)


def summed(t, s):
    return ((t - s) ** 2).sum(-1)


def without_gradient(t, s):
    return (t - s.detach()) ** 2


def not_a_number(t, s):
    return (t - s).log()


def not_a_tensor(t, s):
    return 1.0


def raises(t, s):
    return torch.mm(t, s)
