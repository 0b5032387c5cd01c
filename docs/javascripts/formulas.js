// Formulas between $...$ and $$...$$, which pymdownx.arithmatex has put between \(...\) and \[...\].
document$.subscribe(({ body }) =>
  renderMathInElement(body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  }),
)
