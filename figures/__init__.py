from figures.matrix import interference_matrix
from figures.style import save
