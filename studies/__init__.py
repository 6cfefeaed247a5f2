# SPDX-License-Identifier: Apache-2.0
"""Studies of the bundled model: its data, training and evaluation; not in the wheel."""
