"""nbgrader's settings for the exercises; see README.md in this folder."""

import nbgrader.preprocessors as pre
from nbgrader.utils import is_solution

from lora_course.exercises.release import student_source


class ClearSolutions(pre.ClearSolutions):
    """As in the learners' notebooks: a stub in a function; of a letter only its None is left."""

    def preprocess_cell(self, cell, resources, cell_index):
        if is_solution(cell):
            cell.source = student_source(cell.source)
        return cell, resources


c = get_config()  # noqa: F821 (nbgrader defines it)
c.CourseDirectory.course_id = "lora_from_scratch"
c.Execute.timeout = 120  # seconds a cell
c.GenerateAssignment.preprocessors = [
    pre.LockCells,
    ClearSolutions,
    pre.ClearOutput,
    pre.CheckCellMetadata,
    pre.ComputeChecksums,
    pre.SaveCells,  # hidden tests are kept in the database, and put back when grading
    pre.ClearHiddenTests,
    pre.ComputeChecksums,
    pre.CheckCellMetadata,
]
