// Everything works without this file, but for the menus, the buttons and the moving figure.
const find = (id) => document.getElementById(id);

// The menus of a pair lead to another pair.
if (find("left")) {
  const [left, right] = [find("left"), find("right")];
  const shown = [left.value, right.value];
  const go = (a, b) => { location.href = `${a}-${b}.html`; };
  left.form.hidden = false;
  left.onchange = () => go(left.value, left.value === shown[1] ? shown[0] : shown[1]);
  right.onchange = () => go(right.value === shown[0] ? shown[1] : shown[0], right.value);
  find("swap").onclick = () => go(shown[1], shown[0]);
  window.onpageshow = () => { [left.value, right.value] = shown; };

  const press = (button, action) => {
    button.onclick = () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", pressed);
      action(pressed);
    };
  };
  press(find("folds"), (open) => {
    for (const fold of document.querySelectorAll(".fold")) fold.open = open;
  });
  press(find("core"), (only) => document.body.classList.toggle("only-core", only));
}

// The Tab key goes from fold to fold and from mark to mark, and not through all line numbers.
for (const number of document.querySelectorAll(".rows a[id]")) number.tabIndex = -1;

// A link to a line opens the fold that has it.
function showLine() {
  const line = find(decodeURIComponent(location.hash.slice(1)));
  if (!line) return;
  if (line.closest(".fold")) line.closest(".fold").open = true;
  if (!line.closest(".core .core")) document.body.classList.remove("only-core");
  const row = line.parentElement; // in one column, the right one stands for both of two equal lines
  const twin = row.parentElement.querySelector(`.new[style="${row.getAttribute("style")}"]`);
  (row.offsetParent || !twin ? row : twin).scrollIntoView({ block: "center" });
}
addEventListener("hashchange", showLine);
addEventListener("load", showLine);

addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const cite of document.querySelectorAll(".cite[open]")) cite.open = false;
});

// The clip, by hand.
if (find("clip")) {
  const figure = find("clip"), picture = figure.querySelector("svg");
  const x = (r) => 30 + 170 * r, y = (value) => 110 - 50 * value;
  const show = (id, number) => {
    find(id).textContent = number.toFixed(2).replace(/^-0.00$/, "0.00").replace("-", "−");
  };
  const move = () => {
    const [r, e, a] = ["clip-r", "clip-epsilon", "clip-sign"].map((id) => Number(find(id).value));
    const clip = Math.min(Math.max(r, 1 - e), 1 + e), outside = Math.abs(r - 1) > e + 1e-9;
    const kill = outside && (r > 1) === (a > 0), beta = kill ? -r * a : 0;
    const value = Math.min(r * a, clip * a), slope = kill ? 0 : a;
    find("clip-set").textContent = kill ? "kill" : outside ? "pass" : "in";
    find("clip-says").textContent = `r = ${r.toFixed(2)}, Â = ${a > 0 ? "+1" : "−1"}, ε = ${e.toFixed(2)}`;
    show("clip-min", value), show("clip-min-slope", slope);
    show("clip-phi", r * a - (kill ? (r - clip) * a : 0)), show("clip-phi-slope", a - (kill ? a : 0));
    show("clip-beta", r * a + beta * Math.log(r)), show("clip-beta-slope", a + beta / r);
    const bend = a > 0 ? 1 + e : 1 - e, flat = y(bend * a); // the curve is flat on one side of its bend
    const [start, end] = a > 0 ? [y(0), flat] : [flat, y(-2)];
    find("clip-curve").setAttribute("d", `M${x(0)},${start} L${x(bend)},${flat} L${x(2)},${end}`);
    const rise = slope * 20 * 50 / 170; // of a tangent of 40 units
    find("clip-slope").setAttribute("d", `M${x(r) - 20},${y(value) + rise} L${x(r) + 20},${y(value) - rise}`);
    find("clip-band").setAttribute("x", x(1 - e)), find("clip-band").setAttribute("width", x(2 * e) - x(0));
    find("clip-dot").setAttribute("cx", x(r)), find("clip-dot").setAttribute("cy", y(value));
  };
  figure.querySelector("form").hidden = false;
  figure.oninput = move;
  picture.onpointermove = (event) => {
    const box = picture.getBoundingClientRect();
    find("clip-r").value = ((event.clientX - box.left) / box.width * 400 - 30) / 170;
    move();
  };
  move();
}
