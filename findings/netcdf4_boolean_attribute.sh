#!/usr/bin/env bash
# netCDF4 1.7.5.1.post1: a boolean attribute of an HDF5 file is not there, unless the file has a boolean dataset too.
#
# What one would guess: h5py writes `file.attrs["complete"] = True`, h5dump shows it, so netCDF4 (and xarray with its engine
# netcdf4) lists it, or says that it cannot.
# What happens: the attribute is missing without a word, its neighbours are there. HDF5's boolean of h5py is an enumeration;
# netCDF4 learns of enumerations from datasets. Once any dataset of the file is boolean, the same attribute is listed, as
# an int8. xarray with engine h5netcdf has it in either case.
# What to do: write 0 or 1.
#
# Seen: with integers alone ['before', 'after'], with a boolean dataset ['before', 'complete', 'after'].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check netCDF4==1.7.5.1.post1 h5py==3.16.0 numpy==2.4.6
cat > "$folder/attributes.py" <<'PY'
import sys

import h5py
import netCDF4

path, boolean_dataset = sys.argv[1], sys.argv[2] == "yes"
with h5py.File(path, "w") as file:
    file.attrs["before"], file.attrs["complete"], file.attrs["after"] = 1, True, 2
    file["numbers"] = [1.0, 2.0]
    if boolean_dataset:
        file["mask"] = [True, False]
with h5py.File(path) as file:
    assert list(file.attrs) == ["after", "before", "complete"], list(file.attrs)
with netCDF4.Dataset(path) as file:
    print(",".join(file.ncattrs()))
PY
without=$("$folder/venv/bin/python" "$folder/attributes.py" "$folder/without.h5" no)
with=$("$folder/venv/bin/python" "$folder/attributes.py" "$folder/with.h5" yes)
echo "netCDF4 $("$folder/venv/bin/pip" list 2>/dev/null | awk '$1 == "netCDF4" {print $2}'):" \
    "attributes without a boolean dataset: $without; with one: $with"
[ "$without" = before,after ] && [ "$with" = before,complete,after ]
