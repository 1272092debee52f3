"""Changing numbers of channels: which go together, which can go, and the layers without them.

:mod:`.alignment` follows the channels through a captured model by the rules in :mod:`.operators` and its
neighbours; :mod:`.liveness` decides what can go; :mod:`.layers` says which modules may change, and
:mod:`.shrink` what they become.
"""
