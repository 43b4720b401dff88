(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const examples = [...document.querySelectorAll(".example")];
  const found = document.getElementById("found");
  const choose = () => {
    const wanted = [...new FormData(form)].filter(([, value]) => value);
    let shown = 0;
    for (const example of examples) {
      example.hidden = !wanted.every(([name, value]) => example.dataset[name] === value);
      shown += !example.hidden;
    }
    found.textContent = `${shown} of ${examples.length}`;
  };
  form.addEventListener("change", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  choose(); // a browser may have kept what was chosen before a reload
})();
