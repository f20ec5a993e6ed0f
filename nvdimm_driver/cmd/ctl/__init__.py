# SPDX-License-Identifier: Apache-2.0
"""The commands of nvdimmctl.

``nvdimmctl --help`` imports them all: what a command needs is imported where it is used, and not with its module.
"""
