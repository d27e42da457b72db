"""Free text of a scan that could name a patient. What it says is never shown, only where it is."""

import re
import warnings
from pathlib import Path

from fedseg.data.cases import files_of, is_dicom, nifti_stem
from fedseg.data.volumes import Volume

__all__ = ["identifying_fields"]

_FIELDS = ("descrip", "aux_file", "db_name", "intent_name")

_HARMLESS = re.compile(
    r"(fedseg|nibabel|fsl|spm|itk|simpleitk|ants|afni|freesurfer|mrtrix|elastix|c3d|vtk|matlab"
    r"|3d ?slicer|monai|torchio|nnu-?net|totalsegmentator|dcm2niix?|itk-snap|mricron|medpy)"
    r"([ _:-]*(version|v|r|spm|fsl)?[ _:-]*\d[\d.:a-f-]*)?"
    r"|\d{1,2}(\.\d{1,3}){1,3}(:[0-9a-f]+)?"  # FSL writes its version alone
    r"|((te|tr|ti|time|phase|mb|fa|dwell|acc)=[-\d.]+;?)+"  # dcm2niix
    r"|none|null|unknown|image|scan|volume|ct|mri?|mask|labels?|seg(mentation)?|liver|tumou?rs?",
    re.IGNORECASE,
)

_NOBODY = re.compile(
    r"(anonym\w*|anon|removed|unknown|none|deidentified|de-identified)[\^ _-]*\d*", re.I
)

_EXTENSIONS = {2: "DICOM", 6: "comment"}
"""Codes of header extensions that are made to hold DICOM attributes or text."""


_TAGS = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "OtherPatientIDs"),
    *("PatientTelephoneNumbers", "PatientComments", "ReferringPhysicianName", "OperatorsName"),
    *("PerformingPhysicianName", "AccessionNumber", "InstitutionName", "InstitutionAddress"),
)


def identifying_fields(volume: Volume) -> list[str]:
    """Name the header fields whose text isn't known to be harmless.

    Marks of programs, versions and scan parameters are harmless; everything else could be a name,
    a number or a date of a patient. The file's name and the picture itself (a face, text burnt
    into a slice) aren't looked at; of a DICOM series, the first file's tags are.
    """
    if nifti_stem(volume.path) is None:
        return _dicom_tags(volume.path)
    header = volume.stored
    found = []
    for field in (name for name in _FIELDS if name in header):  # NIfTI-2 has no db_name
        text = bytes(header[field].item()).split(b"\0")[0].decode("latin-1").strip()
        if text and not _HARMLESS.fullmatch(text):
            found.append(field)
    for extension in header.extensions:
        code = int(extension.get_code())
        found.append(f"extension {_EXTENSIONS.get(code, code)}")
    return list(dict.fromkeys(found))


def _dicom_tags(path: Path) -> list[str]:
    import pydicom  # the case couldn't have been read without

    first = next((file for file in files_of(path) if is_dicom(file)), None)
    if first is None:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = [*_TAGS, "PatientIdentityRemoved"]
            tags = pydicom.dcmread(first, stop_before_pixels=True, specific_tags=wanted)
            if str(tags.get("PatientIdentityRemoved", "")) == "YES":
                return []
            values = {name: str(tags.get(name) or "").strip() for name in _TAGS}
    except Exception:  # odd headers break any line of a parser; the case itself was read
        return []
    return [name for name, text in values.items() if text and not _NOBODY.fullmatch(text)]
