# SPDX-License-Identifier: Apache-2.0
"""The commands of nvdimmctl.

``nvdimmctl --help`` imports all of these modules, so a command imports what it needs in the function that uses it.
"""
